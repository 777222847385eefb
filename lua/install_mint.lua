#!lua
-- Counts a new install against a rate limit for each of its networks and one for all. Of each limit a whole period's
-- installs may come at once, then one for each limit-th part of the period (GCRA). Once half of the limit for all is
-- used, the widest network may only use a part of what is free of it, so that something is left for every other one.
-- One step, so that concurrent nodes never let more through, and what one limit refuses is counted by none.
-- Reply: {status, wait_ms, place}
--   status: MINTED | LIMITED (the next one in wait_ms, by the limit of the key at this place); the numbers are else 0
local mint_keys  = KEYS  -- strings: epoch microseconds until which earlier ones use a limit up; with a TTL, all of one slot
local limits_arg = ARGV[1]            -- ints > 0 joined by ",": new installs in a period, for each key
local period_ms  = tonumber(ARGV[2])  -- int > 0, milliseconds
local share      = tonumber(ARGV[3])  -- int >= 0, parts: the last key but one gets one of them, the last is of all; 0: no parts
local now_arg    = ARGV[4]            -- int, epoch milliseconds; "" for the server's time

local each_us, used_us, usable = {}, {}, period_ms and period_ms > 0 and share and share >= 0
for limit in string.gmatch(limits_arg, "[^,]+") do
  limit = tonumber(limit) or 0
  usable = usable and limit > 0
  each_us[#each_us + 1] = usable and math.floor(period_ms * 1000 / limit) -- down, or rounding would cost the last of a period
end
if not usable or #each_us ~= #mint_keys or share > 0 and #mint_keys < 2 then
  return redis.error_reply("BADARG install_mint wants a limit above 0 for each key, a period above 0, and a share")
end
--@include clock -> now_ms
local now_us, period_us, wait_us, place = now_ms * 1000, period_ms * 1000, 0, 0
for i, key in ipairs(mint_keys) do
  used_us[i] = math.max((tonumber(redis.call("GET", key)) or 0) - now_us, 0)
  local over_us = used_us[i] + each_us[i] - period_us
  if over_us > wait_us then wait_us, place = over_us, i end
end
if share > 0 then
  local last = #mint_keys
  local its_us, all_us = each_us[last - 1], each_us[last]
  local until_half_us = used_us[last] + all_us - period_us / 2
  local over = used_us[last - 1] / its_us - (period_us - used_us[last]) / all_us / share
  -- What the network uses becomes less with time, and what is free more.
  local over_us = math.min(until_half_us, over / (1 / its_us + 1 / (all_us * share)))
  if over_us > wait_us then wait_us, place = over_us, last end
end
if place > 0 then return { "LIMITED", math.ceil(wait_us / 1000), place } end
for i, key in ipairs(mint_keys) do
  local next_us = used_us[i] + each_us[i]
  redis.call("SET", key, string.format("%.0f", now_us + next_us), "PX", math.ceil(next_us / 1000))
end
return { "MINTED", 0, 0 }
