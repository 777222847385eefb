#!lua
-- Plans a request and debits it at once: roll over, sum the live holds, decide, promote, count. One step, for callers
-- with nothing to wait for. Nothing in it tells a repeat from a second request, so it must never be repeated blindly.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms}
--   status: COMMITTED | DENIED | UNKNOWN_INSTALL
--   reason, of DENIED: out_of_credits | gemini_cap_exceeded_no_hardware | credits_in_flight
local row_key        = KEYS[1]            -- hash; its fields are listed in include/row.lua
local tier_name      = ARGV[1]            -- string, 1..20 bytes
local counter        = ARGV[2]            -- lifetime | monthly: what the tier's quota counts
local quota          = tonumber(ARGV[3])  -- int >= 0, credits; "" for none
local gemini_cap     = tonumber(ARGV[4])  -- int >= 0, credits; "" for none
local has_hardware   = ARGV[5] == "1"     -- 1 | 0
local cost           = tonumber(ARGV[6])  -- int > 0, credits
local lifetime_tiers = ARGV[7]            -- names joined by ",": the tiers whose quota is a lifetime's
local may_create     = ARGV[8] == "1"     -- 1 | 0: whether an unknown install gets a row
local now_arg        = ARGV[9]            -- int, epoch milliseconds; "" for the server's time
--@include clock
--@include calendar
--@include row
--@include debit
--@include holds
--@include plan

if not (cost and cost > 0 and cost % 1 == 0) then return redis.error_reply("BADARG debit wants a whole cost above 0") end
local now_ms = clock.now_ms(now_arg)
local r, broken = row.read(row_key, "hold:", now_ms)
if broken then return broken end
local h, broken_hold = holds.read(row_key, r, now_ms)
if broken_hold then return broken_hold end
if r.created and not may_create then
  return plan.reply("UNKNOWN_INSTALL", "", false, r, h, counter, quota, gemini_cap, now_ms)
end

local backend, reason = plan.decide(r, h, counter, quota, gemini_cap, nil, cost, has_hardware)
local changes
if backend then
  changes = debit.apply(r, tier_name, counter, backend, cost, lifetime_tiers, now_ms)
else
  changes = row.changes(r, now_ms)
end
if changes[1] then redis.call("HSET", row_key, unpack(changes)) end
return plan.reply(backend and "COMMITTED" or "DENIED", reason, backend, r, h, counter, quota, gemini_cap, now_ms)
