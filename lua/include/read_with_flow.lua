-- As include/read.lua, and what include/flow.lua wants: of each field that is read there a decision feels the cost.
-- Takes: row_key, hold_field
-- Gives: f, flow
local f = redis.call("HMGET", row_key, "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "held", hold_field, "flow")
local flow = f[9]
