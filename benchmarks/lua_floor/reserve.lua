-- Reads and writes what reserve.lua reads and writes, and decides nothing: the floor to measure it against.
local f = redis.call("HMGET", KEYS[1], "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "held", "hold:" .. ARGV[1], "flow")
redis.call("HSET", KEYS[1], "hold:" .. ARGV[1], "gemini pro monthly 1 1780000000000", "held", "1 0 0 0 1 1 1780000000000",
  "flow", 1780000000000)
return { "ALLOWED", "", "gemini", 999995, 399997, 1, 1780000000000, f[5], 1780000000000, 0 }
