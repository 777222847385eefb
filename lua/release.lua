#!lua flags=allow-oom
-- Releases a hold: its credits are free again. One step, so that a retry finds no hold and changes nothing.
-- A hold that is released as its client left, after a backend had begun to work for it, is a leave. A tier has some that
-- are free and gets one more an hour; any other is debited. The retries of a request that was left are the same leave:
-- up to 20 of them, for an hour.
-- Reply: {status, tier, backend, cost, is_beyond}   status: RELEASED | COMMITTED (debited) | LATE (debited, although the
--   hold had expired) | GONE (no such hold: committed or released before)
--   is_beyond: 1 for a leave that is not free, also where it is not enforced; else 0
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key        = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id        = ARGV[1]            -- string, 1..48 bytes
local is_leave       = ARGV[2] == "1"     -- 1 | 0: whether it is a leave; what follows is for leaves
local free_leaves    = ARGV[3] ~= "" and ARGV[3] + 0  -- int >= 0, leaves that are free; "" for all
local request        = ARGV[4]            -- string, 0..40 bytes: what its retries have in common; "" for none
local is_retry       = ARGV[5] == "1"     -- 1 | 0: whether it may be a retry of a request that was left
local enforces       = ARGV[6] == "1"     -- 1 | 0: whether leaves are debited, or is_beyond is only told
local used_backend   = ARGV[7]            -- gemini | hardware; "" for the one planned
local lifetime_tiers = ARGV[8]            -- names joined by ",": the tiers whose quota is a lifetime's
local now_arg        = ARGV[9]            -- int, epoch milliseconds; "" for the server's time
if hold_id == "" or free_leaves and free_leaves < 0 then
  return redis.error_reply("BADARG release wants a hold id, and free leaves of 0 or more or none")
end
local hold_field = "hold:" .. hold_id
--@include clock -> now_ms
--@include bad_row -> bad_row
if not is_leave then
  local f = redis.call("HMGET", row_key, "held", hold_field)
  local held, hold = f[1], f[2]
  if not hold then return { "GONE", "", "", 0, 0 } end
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead
  if dead then redis.call("HDEL", row_key, unpack(dead)) end
  if live then
--@include held_text -> held_text
    redis.call("HDEL", row_key, hold_field)
    redis.call("HSET", row_key, "held", held_text)
  else
    redis.call("HDEL", row_key, hold_field, "held")
  end
  return { "RELEASED", "", "", 0, 0 }
end
--@include now_iso -> now_iso
--@include read_with_flow -> f, flow
--@include row -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
if not renews_ms then
--@include calendar -> civil, renewal_ms
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
end
if not hold then return { "GONE", "", "", 0, 0 } end
--@include holds -> held_backend, held_tier, held_counter, held_cost, expires_ms, live, expired, held_lifetime,
--  held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead
--@include flow -> rate_until, left_until, marks, marks_recount
local left_field, left, retries = "left:" .. request, nil, nil
if is_retry and request ~= "" then
  left = redis.call("HMGET", row_key, left_field)[1]
  if left then left, retries = string.match(left, "^(%d+) (%d+)$") end
  if left and (left + 0 <= now_ms or retries + 0 >= 20) then left = nil end
end
local is_beyond = false
if not left then
  local used = math.max(left_until - now_ms, 0)
  if free_leaves then used = math.min(used, free_leaves * 3600000) end
  used = used + 3600000
  is_beyond = free_leaves and used > free_leaves * 3600000
  if not is_beyond then left_until = string.format("%d", now_ms + used) end
  left, retries = string.format("%d", now_ms + 3600000), -1
end
local status, tier, backend, cost = "RELEASED", "", "", 0
if is_beyond and enforces then
  status, tier, backend, cost = expires_ms > now_ms and "COMMITTED" or "LATE", held_tier, used_backend, held_cost
  if backend == "" then backend = held_backend end
  local counter = held_counter
--@include counters -> consumed, gemini_consumed, consumed_field, gemini_consumed_field
--@include charge -> consumed, gemini_consumed, changes, promoted
  if changes then redis.call("HSET", row_key, unpack(changes)) end -- first: the counters may be among them
  redis.call("HSET", row_key, consumed_field, consumed, gemini_consumed_field, gemini_consumed, "tier_snapshot", tier,
    "last_active_at", now_iso)
elseif request ~= "" then
  redis.call("HSET", row_key, left_field, left .. " " .. retries + 1)
  if marks_recount == "0" or marks_recount + 0 > left + 0 then marks_recount = left end
end
if dead then redis.call("HDEL", row_key, unpack(dead)) end
if live then
--@include held_text -> held_text
  redis.call("HDEL", row_key, hold_field)
  redis.call("HSET", row_key, "held", held_text)
else
  redis.call("HDEL", row_key, hold_field, "held")
end
--@include flow_text -> flow_text
redis.call("HSET", row_key, "flow", flow_text)
return { status, tier, backend, cost, is_beyond and 1 or 0 }
