std = "lua51"
read_globals = { "redis" }
globals = { "KEYS", "ARGV" }
max_line_length = 130
-- An include is pasted: parameters and loop variables may be called like names of the script (4…), and not every script
-- needs all that one gives (211, 231, 311, 331). What an include takes and gives is tested, as is the use of each.
ignore = { "431", "432", "421", "422", "211", "212", "231", "311", "331" }
