#!lua
-- Stores one row as it is given, for import, restore and admin. Live holds are left alone. One step, so that a row
-- that is being debited is either kept or replaced whole.
-- Reply: {status}   status: CREATED | SAME (it already read so) | REPLACED | MERGED | EXISTS (mode create: left alone)
local row_key                  = KEYS[1]             -- hash; its fields are listed in include/row.lua
local mode                     = ARGV[1]             -- create | replace | merge; with a ? after it: tell, write nothing
local tier_snapshot            = ARGV[2]             -- string, 1..20 bytes
local lifetime_consumed        = tonumber(ARGV[3])   -- int >= 0, credits
local lifetime_gemini_consumed = tonumber(ARGV[4])   -- int >= 0, credits
local last_renewal_at          = ARGV[5]             -- time, as 2026-05-11T23:02:57.123Z
local anniversary_day          = tonumber(ARGV[6])   -- int 1..31
local monthly_consumed         = tonumber(ARGV[7])   -- int >= 0, credits
local monthly_gemini_consumed  = tonumber(ARGV[8])   -- int >= 0, credits
local last_active_at           = ARGV[9]             -- time, as 2026-05-11T23:02:57.123Z
local extra                    = ARGV[10]            -- JSON object of the other members; "" for none
--@include calendar -> civil, renewal_ms

local verb, asks = string.match(mode, "^(%l+)(%??)$")
local function is_count(n, least, most) return n and n >= least and n <= most and n % 1 == 0 end
local most = 9007199254740991
if not ((verb == "create" or verb == "replace" or verb == "merge") and tier_snapshot ~= "" and #tier_snapshot <= 20
  and civil(last_renewal_at) and civil(last_active_at)
  and is_count(anniversary_day, 1, 31) and is_count(lifetime_consumed, 0, most)
  and is_count(lifetime_gemini_consumed, 0, most) and is_count(monthly_consumed, 0, most)
  and is_count(monthly_gemini_consumed, 0, most)) then
  return redis.error_reply("BADARG put_row wants a mode, a tier, two times, a day from 1 to 31 and four counters")
end
local new = { tier_snapshot, lifetime_consumed, lifetime_gemini_consumed, last_renewal_at, anniversary_day,
  monthly_consumed, monthly_gemini_consumed, last_active_at, extra }
local names = { "tier_snapshot", "lifetime_consumed", "lifetime_gemini_consumed", "last_renewal_at", "anniversary_day",
  "monthly_consumed", "monthly_gemini_consumed", "last_active_at", "extra" }
local old = redis.call("HMGET", row_key, unpack(names))
local status = verb == "merge" and "MERGED" or "REPLACED"
if redis.call("EXISTS", row_key) == 0 then
  status = "CREATED"
elseif verb == "merge" then
  -- The larger counters win. Those of a month compare only within one billing period: a later period wins whole. Of
  -- two days for one period the stored one wins: the other may be inferred from a clamped date.
  local hold_field, now_ms = "hold:", 0
--@include bad_row -> bad_row
--@include row -> f, lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
  if not renews_ms then
--@include now_iso -> now_iso
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
  end
  new[2], new[3] = math.max(new[2], lifetime), math.max(new[3], lifetime_gemini)
  if began == last_renewal_at then
    new[5] = tonumber(old[5]) or new[5]
    new[6], new[7] = math.max(new[6], monthly), math.max(new[7], monthly_gemini)
  elseif began > last_renewal_at then
    new[4], new[5], new[6], new[7] = began, anniversary_day, tonumber(monthly), tonumber(monthly_gemini)
  end
  if civil(old[8] or "") and old[8] > last_active_at then new[1], new[8] = old[1] or "core", old[8] end
  if extra == "" then new[9] = old[9] or "" end
end

local changes, same = {}, true
for i, name in ipairs(names) do
  local value = type(new[i]) == "number" and string.format("%.0f", new[i]) or new[i]
  if value ~= (old[i] or "") then same = false end
  if name ~= "extra" or value ~= "" then
    changes[#changes + 1], changes[#changes + 2] = name, value
  end
end
if status ~= "CREATED" and (same or verb == "create") then return { same and "SAME" or "EXISTS" } end
if asks == "?" then return { status } end
if old[9] and new[9] == "" then redis.call("HDEL", row_key, "extra") end
redis.call("HSET", row_key, unpack(changes))
return { status }
