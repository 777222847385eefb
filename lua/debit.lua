#!lua
-- Plans a request and debits it at once: roll over, sum the live holds, decide, promote, count. One step, for callers
-- with nothing to wait for. It cannot tell a retry from a second request, so it must never be retried blindly.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms, rate_wait}
--   status: COMMITTED | DENIED | UNKNOWN_INSTALL
--   reason, of DENIED: out_of_credits | gemini_cap_exceeded_no_hardware | rate_limited | credits_in_flight
--   rate_wait: as of reserve
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key        = KEYS[1]            -- hash; its fields are listed in include/row.lua
local tier_name      = ARGV[1]            -- string, 1..20 bytes
local counter        = ARGV[2]            -- lifetime | monthly: what the tier's quota counts
local quota          = ARGV[3] ~= "" and ARGV[3] + 0  -- int >= 0, credits; "" for none
local gemini_cap     = ARGV[4] ~= "" and ARGV[4] + 0  -- int >= 0, credits; "" for none
local has_hardware   = ARGV[5] == "1"     -- 1 | 0: whether hardware can serve this request
local has_gemini     = ARGV[6] == "1"     -- 1 | 0: whether Gemini can; one of the two
local cost           = ARGV[7] + 0        -- int > 0, credits
local lifetime_tiers = ARGV[8]            -- names joined by ",": the tiers whose quota is a lifetime's
local may_create     = ARGV[9] == "1"     -- 1 | 0: whether an unknown install gets a row
local rate_ms        = ARGV[10] ~= "" and ARGV[10] + 0  -- int > 0, milliseconds for each request; "" for no rate
local burst_ms       = ARGV[11] ~= "" and ARGV[11] + 0  -- int > 0, milliseconds of it that may be used at once; "" likewise
local enforces_rate  = ARGV[12] == "1"    -- 1 | 0: whether the rate refuses, or only its rate_wait is told
local now_arg        = ARGV[13]           -- int, epoch milliseconds; "" or none for the server's time
if cost <= 0 or cost % 1 ~= 0 then return redis.error_reply("BADARG debit wants a whole cost above 0") end
local hold_field, max_in_flight = "hold:", nil
--@include clock -> now_ms
--@include now_iso -> now_iso
--@include bad_row -> bad_row
--@include read_with_flow -> f, flow
--@include row -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
if not renews_ms then
--@include calendar -> civil, renewal_ms
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
end
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead
--@include counters -> consumed, gemini_consumed, consumed_field, gemini_consumed_field
--@include held_credits -> held_credits, held_on_gemini
--@include flow -> rate_until, left_until, marks, marks_recount
--@include rate -> rate_used, rate_wait
--@include plan -> backend, reason

local status = backend ~= "" and "COMMITTED" or "DENIED"
if created and not may_create then
  status, backend, reason, changes = "UNKNOWN_INSTALL", "", "", nil
elseif backend ~= "" then
--@include charge -> consumed, gemini_consumed, changes, promoted
  if changes then redis.call("HSET", row_key, unpack(changes)) end -- first: the counters may be among them
  redis.call("HSET", row_key, consumed_field, consumed, gemini_consumed_field, gemini_consumed, "tier_snapshot", tier_name,
    "last_active_at", now_iso)
  if rate_ms and rate_wait == 0 then
    rate_until = now_ms + rate_used
--@include flow_text -> flow_text
    redis.call("HSET", row_key, "flow", flow_text)
  end
  changes = nil
  if promoted then
--@include calendar -> civil, renewal_ms
    local month, day, ms_of_day = civil(now_iso)
    began, renews_ms = now_iso, renewal_ms(month + 1, day, ms_of_day)
  end
end
if changes then redis.call("HSET", row_key, unpack(changes)) end
--@include reply -> nothing
