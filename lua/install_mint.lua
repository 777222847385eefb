#!lua
-- Counts a new install against a rate limit. A whole period's installs may come at once, then one for each limit-th
-- part of the period (GCRA). One step, so that concurrent nodes never let more through.
-- Reply: {status, wait_ms}
--   status: MINTED | LIMITED (the next one in wait_ms) | RETURNED; wait_ms is 0 but for LIMITED
local mint_key  = KEYS[1]            -- string: epoch microseconds until which earlier ones use the limit up; with a TTL
local limit     = tonumber(ARGV[1])  -- int > 0, new installs in a period
local period_ms = tonumber(ARGV[2])  -- int > 0, milliseconds
local returns   = ARGV[3] == "1"     -- 1 | 0: whether to return one that was counted
local now_arg   = ARGV[4]            -- int, epoch milliseconds; "" for the server's time

if not (limit and limit > 0 and period_ms and period_ms > 0) then
  return redis.error_reply("BADARG install_mint wants a limit and a period above 0")
end
--@include clock -> now_ms
local now_us, period_us = now_ms * 1000, period_ms * 1000
local each_us = math.floor(period_us / limit) -- down, or rounding would cost the last of a period
local used_us = math.max(tonumber(redis.call("GET", mint_key)) or 0, now_us)
local next_us = used_us + (returns and -each_us or each_us)
if next_us - now_us > period_us then return { "LIMITED", math.ceil((next_us - now_us - period_us) / 1000) } end
if next_us > now_us then
  redis.call("SET", mint_key, string.format("%.0f", next_us), "PX", math.ceil((next_us - now_us) / 1000))
else
  redis.call("DEL", mint_key)
end
return { returns and "RETURNED" or "MINTED", 0 }
