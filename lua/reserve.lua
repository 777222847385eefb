#!lua
-- Plans a request and holds its credits: roll over, sum the live holds, decide, hold. One step, so that requests of
-- any number of nodes at once are never promised the same credit.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms}
--   status: ALLOWED | REPLAY (this hold is live already: the same answer) | DENIED | UNKNOWN_INSTALL
--   reason, of DENIED: out_of_credits | gemini_cap_exceeded_no_hardware | credits_in_flight | too_many_in_flight
local row_key       = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id       = ARGV[1]            -- string, 1..48 bytes
local tier_name     = ARGV[2]            -- string, 1..20 bytes
local counter       = ARGV[3]            -- lifetime | monthly: what the tier's quota counts
local quota         = tonumber(ARGV[4])  -- int >= 0, credits; "" for none
local gemini_cap    = tonumber(ARGV[5])  -- int >= 0, credits; "" for none
local max_in_flight = tonumber(ARGV[6])  -- int > 0, live holds; "" for no limit
local has_hardware  = ARGV[7] == "1"     -- 1 | 0
local cost          = tonumber(ARGV[8])  -- int > 0, credits
local hold_ms       = tonumber(ARGV[9])  -- int > 0, milliseconds until the hold lapses
local may_create    = ARGV[10] == "1"    -- 1 | 0: whether an unknown install gets a row
local now_arg       = ARGV[11]           -- int, epoch milliseconds; "" for the server's time
--@include clock
--@include calendar
--@include row
--@include holds
--@include plan

if hold_id == "" or not (cost and cost > 0 and cost % 1 == 0 and hold_ms and hold_ms > 0) then
  return redis.error_reply("BADARG reserve wants a hold id, and a whole cost and a hold time above 0")
end
local now_ms, hold_field = clock.now_ms(now_arg), "hold:" .. hold_id
local r, broken = row.read(row_key, hold_field, now_ms)
if broken then return broken end
local h, broken_hold = holds.read(row_key, r, now_ms)
if broken_hold then return broken_hold end
if r.created and not may_create then
  return plan.reply("UNKNOWN_INSTALL", "", false, r, h, counter, quota, gemini_cap, now_ms)
end
if r.hold then
  local held_on, _, held_counter, held_cost, lapses_ms = holds.parse(r.hold)
  if not held_on then return row.broken(row_key, hold_field, r.hold, "text like 'gemini pro monthly 1 1780000000000'") end
  if lapses_ms > now_ms then
    return plan.reply("REPLAY", "", held_on, r, h, counter, quota, gemini_cap, now_ms)
  end
  holds.add(h, -1, held_on, held_counter, held_cost, lapses_ms, now_ms)
end

local backend, reason = plan.decide(r, h, counter, quota, gemini_cap, max_in_flight, cost, has_hardware)
local changes = row.changes(r, now_ms)
if backend then
  local n, lapses_ms = #changes, now_ms + hold_ms
  holds.add(h, 1, backend, counter, cost, lapses_ms, now_ms)
  changes[n + 1], changes[n + 2] = hold_field, string.format("%s %s %s %d %d", backend, tier_name, counter, cost, lapses_ms)
  changes[n + 3], changes[n + 4] = "held", holds.text(h)
  if h.dead and h.dead[1] then redis.call("HDEL", row_key, unpack(h.dead)) end
end
if changes[1] then redis.call("HSET", row_key, unpack(changes)) end
return plan.reply(backend and "ALLOWED" or "DENIED", reason, backend, r, h, counter, quota, gemini_cap, now_ms)
