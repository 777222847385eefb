#!lua flags=allow-oom
-- Turns a hold into a debit: roll over, promote, count the credits that were really used, drop the hold. One step,
-- so that a retry finds no hold and debits nothing. It never fails for lack of balance: what was delivered is debited.
-- A stream that still runs leaves a mark, which counts as in flight until stream.lua removes it or its lease ends.
-- Reply: {status, tier, backend, cost}
--   status: COMMITTED | LATE (the hold had expired; debited all the same) | GONE (no such hold: committed or released)
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key        = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id        = ARGV[1]            -- string, 1..48 bytes
local used_backend   = ARGV[2]            -- gemini | hardware; "" for the one planned
local used_cost      = ARGV[3] ~= "" and ARGV[3] + 0  -- int > 0, credits; "" for what was held
local lifetime_tiers = ARGV[4]            -- names joined by ",": the tiers whose quota is a lifetime's
local mark_ms        = ARGV[5] ~= "" and ARGV[5] + 0  -- int > 0, milliseconds of a mark's lease; "" for no mark
local now_arg        = ARGV[6]            -- int, epoch milliseconds; "" or none for the server's time
if hold_id == "" or used_cost and (used_cost <= 0 or used_cost % 1 ~= 0) then
  return redis.error_reply("BADARG commit wants a hold id, and a whole cost above 0 or none")
end
local hold_field = "hold:" .. hold_id
--@include clock -> now_ms
--@include now_iso -> now_iso
--@include bad_row -> bad_row
--@include read -> f
--@include row -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
if not renews_ms then
--@include calendar -> civil, renewal_ms
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
end
if not hold then return { "GONE", "", "", 0 } end
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead

local backend, cost, counter = used_backend, used_cost or held_cost, held_counter
if backend == "" then backend = held_backend end
--@include counters -> consumed, gemini_consumed, consumed_field, gemini_consumed_field
--@include charge -> consumed, gemini_consumed, changes, promoted

if dead then redis.call("HDEL", row_key, unpack(dead)) end
if changes then redis.call("HSET", row_key, unpack(changes)) end -- first: the counters may be among them
if live then
--@include held_text -> held_text
  redis.call("HDEL", row_key, hold_field)
  redis.call("HSET", row_key, "held", held_text, consumed_field, consumed, gemini_consumed_field, gemini_consumed,
    "tier_snapshot", held_tier, "last_active_at", now_iso)
else
  redis.call("HDEL", row_key, hold_field, "held")
  redis.call("HSET", row_key, consumed_field, consumed, gemini_consumed_field, gemini_consumed, "tier_snapshot", held_tier,
    "last_active_at", now_iso)
end
if mark_ms then
  local flow = redis.call("HMGET", row_key, "flow")[1]
--@include flow -> rate_until, left_until, marks, marks_recount
  local until_ms = string.format("%d", now_ms + mark_ms)
  if redis.call("HSET", row_key, "run:" .. hold_id, until_ms) == 0 then
    marks_recount = "1" -- a hold of this name left a mark before
  elseif marks_recount == "0" or marks_recount + 0 > now_ms then -- else they are counted again, with this one
    marks = marks + 1
    if marks_recount == "0" or marks_recount + 0 > now_ms + mark_ms then marks_recount = until_ms end
  end
--@include flow_text -> flow_text
  redis.call("HSET", row_key, "flow", flow_text)
end
return { expires_ms > now_ms and "COMMITTED" or "LATE", held_tier, backend, cost }
