-- What include/row.lua wants of a row, read at once.
-- Takes: row_key, hold_field
-- Gives: f
local f = redis.call("HMGET", row_key, "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "held", hold_field)
