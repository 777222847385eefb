#!lua flags=no-writes
-- Tells what a tier has left on a row, as if it were rolled over now. It writes nothing and creates nothing.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms}
--   status: KNOWN | UNKNOWN_INSTALL (no row: what a new one would have); reason and backend are ""
local row_key    = KEYS[1]            -- hash; its fields are listed in include/row.lua
local counter    = ARGV[1]            -- lifetime | monthly: what the tier's quota counts
local quota      = tonumber(ARGV[2])  -- int >= 0, credits; "" for none
local gemini_cap = tonumber(ARGV[3])  -- int >= 0, credits; "" for none
local now_arg    = ARGV[4]            -- int, epoch milliseconds; "" for the server's time
--@include clock
--@include calendar
--@include row
--@include holds
--@include plan

if counter ~= "lifetime" and counter ~= "monthly" then
  return redis.error_reply("BADARG balance wants a counter, lifetime or monthly")
end
local now_ms = clock.now_ms(now_arg)
local r, broken = row.read(row_key, "hold:", now_ms)
if broken then return broken end
local h, broken_hold = holds.read(row_key, r, now_ms)
if broken_hold then return broken_hold end
return plan.reply(r.created and "UNKNOWN_INSTALL" or "KNOWN", "", false, r, h, counter, quota, gemini_cap, now_ms)
