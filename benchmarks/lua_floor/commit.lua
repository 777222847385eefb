-- Reads and writes what commit.lua reads and writes, and decides nothing: the floor to measure it against.
redis.call("HMGET", KEYS[1], "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "held", "hold:" .. ARGV[1], "flow")
redis.call("HDEL", KEYS[1], "hold:" .. ARGV[1], "held")
redis.call("HSET", KEYS[1], "monthly_consumed", 1, "monthly_gemini_consumed", 1, "tier_snapshot", "pro",
  "last_active_at", "2026-05-11T23:02:57.123Z")
return { "COMMITTED", "pro", "gemini", 1 }
