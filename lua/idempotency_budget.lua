#!lua
-- Counts bytes that are to be kept for a time, unless a budget has no room for them. They count until they have surely
-- expired, for up to an eighth longer than they are kept. One step, so that concurrent nodes never exceed the budget.
-- Reply: {status}   status: COUNTED | EXCEEDED (nothing was counted)
local kept_key = KEYS[1]            -- hash: epoch milliseconds -> the bytes that count until then; has a TTL
local bytes    = tonumber(ARGV[1])  -- int > 0, to be kept
local budget   = tonumber(ARGV[2])  -- int >= 0, bytes
local keep_ms  = tonumber(ARGV[3])  -- int > 0, milliseconds until these bytes expire
local now_arg  = ARGV[4]            -- int, epoch milliseconds; "" for the server's time

if not (bytes and bytes > 0 and budget and budget >= 0 and keep_ms and keep_ms > 0) then
  return redis.error_reply("BADARG idempotency_budget wants bytes above 0, a budget from 0 and a time above 0")
end
--@include clock -> now_ms
local step_ms = math.ceil(keep_ms / 8) -- so that there are few fields
local until_ms = (math.floor((now_ms + keep_ms) / step_ms) + 1) * step_ms
local counted, same, last_ms, expired = 0, 0, until_ms, {}
local all = redis.call("HGETALL", kept_key)
for i = 1, #all, 2 do
  local at_ms, count = tonumber(all[i]), tonumber(all[i + 1])
  if at_ms <= now_ms then
    expired[#expired + 1] = all[i]
  else
    counted, last_ms = counted + count, math.max(last_ms, at_ms)
  end
  if at_ms == until_ms then same = count end
end
if expired[1] then redis.call("HDEL", kept_key, unpack(expired)) end
if counted + bytes > budget then return { "EXCEEDED" } end
redis.call("HSET", kept_key, string.format("%.0f", until_ms), string.format("%.0f", same + bytes))
redis.call("PEXPIRE", kept_key, string.format("%.0f", last_ms - now_ms))
return { "COUNTED" }
