-- The composed scripts are checked, includes in place: see check-lua in the Makefile.
std = "lua51"
read_globals = { "redis" }
globals = { "KEYS", "ARGV" }
max_line_length = 130
ignore = {
  -- Not every script needs all that an include gives. A name that is not listed here must be used.
  "211/held", "211/hold", "231/held_tier", "311/expires_ms", "311/dead",        -- by holds and row
  "231/consumed_field", "231/gemini_consumed_field", "231/held_on_gemini",      -- by counters and held_credits
  "311/renews_ms", "331/changes",                                               -- by rollover, for those that only read
  "311/lifetime", "311/lifetime_gemini",                                        -- by rollover: put_row merges the month's
  "421/anniversary_day",                                                        -- put_row: the stored row's, beside its own
}
