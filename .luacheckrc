std = "lua51"
read_globals = { "redis" }
globals = { "KEYS", "ARGV" }
max_line_length = 130
-- An include is pasted below the script's own names and uses none of them: its parameters may be called alike.
ignore = { "431", "432", "421", "422", "211/.*_", "212" }
