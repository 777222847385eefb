#!lua flags=no-writes
-- Tells what a tier has left on a row, as if it were rolled over now. It writes nothing and creates nothing.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms}
--   status: KNOWN | UNKNOWN_INSTALL (no row: what a new one would have); reason and backend are ""
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key    = KEYS[1]            -- hash; its fields are listed in include/row.lua
local counter    = ARGV[1]            -- lifetime | monthly: what the tier's quota counts
local quota      = ARGV[2] ~= "" and ARGV[2] + 0  -- int >= 0, credits; "" for none
local gemini_cap = ARGV[3] ~= "" and ARGV[3] + 0  -- int >= 0, credits; "" for none
local now_arg    = ARGV[4]            -- int, epoch milliseconds; "" for the server's time
if counter ~= "lifetime" and counter ~= "monthly" then
  return redis.error_reply("BADARG balance wants a counter, lifetime or monthly")
end
local hold_field, status, backend, reason = "hold:", "KNOWN", "", ""
--@include clock
--@include bad_row
--@include row
if not renews_ms then
--@include now_iso
--@include calendar
--@include rollover
end
--@include holds
--@include counters
--@include held_credits
if created then status = "UNKNOWN_INSTALL" end
--@include reply
