#!lua
-- Plans a request and holds its credits: roll over, sum the live holds, decide, hold. One step, so that requests on any
-- number of nodes at once are never promised the same credit.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms, rate_wait}
--   status: ALLOWED | REPLAY (this hold is live already: the same answer) | DENIED | UNKNOWN_INSTALL
--   reason, of DENIED: out_of_credits | gemini_cap_exceeded_no_hardware | rate_limited | too_many_in_flight |
--     credits_in_flight
--   rate_wait: milliseconds until the rate has room for one more request, 0 if it has
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key       = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id       = ARGV[1]            -- string, 1..48 bytes
local tier_name     = ARGV[2]            -- string, 1..20 bytes
local counter       = ARGV[3]            -- lifetime | monthly: what the tier's quota counts
local quota         = ARGV[4] ~= "" and ARGV[4] + 0  -- int >= 0, credits; "" for none
local gemini_cap    = ARGV[5] ~= "" and ARGV[5] + 0  -- int >= 0, credits; "" for none
local max_in_flight = ARGV[6] ~= "" and ARGV[6] + 0  -- int > 0, live holds; "" for no limit
local has_hardware  = ARGV[7] == "1"     -- 1 | 0: whether hardware can serve this request
local has_gemini    = ARGV[8] == "1"     -- 1 | 0: whether Gemini can; one of the two
local cost_arg      = ARGV[9]            -- int > 0, credits
local hold_ms       = ARGV[10] + 0       -- int > 0, milliseconds until the hold expires
local may_create    = ARGV[11] == "1"    -- 1 | 0: whether an unknown install gets a row
local rate_ms       = ARGV[12] ~= "" and ARGV[12] + 0  -- int > 0, milliseconds for each request; "" for no rate
local burst_ms      = ARGV[13] ~= "" and ARGV[13] + 0  -- int > 0, milliseconds of it that may be used at once; "" likewise
local enforces_rate = ARGV[14] == "1"    -- 1 | 0: whether the rate refuses, or only its rate_wait is told
local now_arg       = ARGV[15]           -- int, epoch milliseconds; "" or none for the server's time
local hold_field, cost = "hold:" .. hold_id, cost_arg + 0
if hold_id == "" or cost <= 0 or cost % 1 ~= 0 or hold_ms <= 0 then
  return redis.error_reply("BADARG reserve wants a hold id, and a whole cost and a hold time above 0")
end
--@include clock -> now_ms
--@include bad_row -> bad_row
--@include read_with_flow -> f, flow
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
--@include flow -> rate_until, left_until, marks, marks_recount
--@include marks -> marks, marks_recount, dead_marks
--@include rate -> rate_used, rate_wait
--@include plan -> backend, reason

local status = backend ~= "" and "ALLOWED" or "DENIED"
if created and not may_create then
  status, backend, reason, changes = "UNKNOWN_INSTALL", "", "", nil
elseif expires_ms and expires_ms > now_ms then
  status, backend, reason, rate_wait = "REPLAY", held_backend, "", 0
  if held_counter == counter then held_credits = held_credits + held_cost end
elseif backend ~= "" then
--@include place_hold -> hold_text, held_credits, live, expired, held_lifetime, held_lifetime_gemini, held_monthly,
--  held_monthly_gemini, recount_ms
--@include held_text -> held_text
  if dead then redis.call("HDEL", row_key, unpack(dead)) end
  if dead_marks then redis.call("HDEL", row_key, unpack(dead_marks)) end
  if changes then
    redis.call("HSET", row_key, unpack(changes))
    changes = nil
  end
  if rate_ms and rate_wait == 0 then rate_until = now_ms + rate_used end
--@include flow_text -> flow_text
  if flow_text ~= 0 then
    redis.call("HSET", row_key, hold_field, hold_text, "held", held_text, "flow", flow_text)
  else
    redis.call("HSET", row_key, hold_field, hold_text, "held", held_text)
  end
end
if changes then redis.call("HSET", row_key, unpack(changes)) end
--@include reply -> nothing
