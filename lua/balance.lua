#!lua flags=no-writes
-- Returns what a tier has left on a row, as if it were rolled over now. It writes nothing and creates nothing.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms, 0}
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
local hold_field, status, backend, reason, rate_wait = "hold:", "KNOWN", "", "", 0
--@include clock -> now_ms
--@include bad_row -> bad_row
--@include read -> f
--@include row -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
if not renews_ms then
--@include now_iso -> now_iso
--@include calendar -> civil, renewal_ms
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
end
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead
--@include counters -> consumed, gemini_consumed, consumed_field, gemini_consumed_field
--@include held_credits -> held_credits, held_on_gemini
if created then status = "UNKNOWN_INSTALL" end
--@include reply -> nothing
