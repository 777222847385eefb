#!lua flags=allow-oom
-- Releases a hold: its credits are free again. One step, so that a retry finds no hold and changes nothing.
-- Reply: {status}   status: RELEASED | GONE (no such hold: committed or released before)
local row_key = KEYS[1]  -- hash; its fields are listed in include/row.lua
local hold_id = ARGV[1]  -- string, 1..48 bytes
local now_arg = ARGV[2]  -- int, epoch milliseconds; "" for the server's time
if hold_id == "" then return redis.error_reply("BADARG release wants a hold id") end
local hold_field = "hold:" .. hold_id
local f = redis.call("HMGET", row_key, "held", hold_field)
local held, hold = f[1], f[2]
if not hold then return { "GONE" } end
--@include clock -> now_ms
--@include bad_row -> bad_row
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead

if dead then redis.call("HDEL", row_key, unpack(dead)) end
if live then
--@include held_text -> held_text
  redis.call("HDEL", row_key, hold_field)
  redis.call("HSET", row_key, "held", held_text)
else
  redis.call("HDEL", row_key, hold_field, "held")
end
return { "RELEASED" }
