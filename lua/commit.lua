#!lua flags=allow-oom
-- Turns a hold into a debit: roll over, promote, count the credits of what was really used, drop the hold. One step,
-- so that a repeat finds no hold and debits nothing. It never fails for lack of balance: what was delivered is debited.
-- Reply: {status, tier, backend, cost}
--   status: COMMITTED | LATE (the hold had lapsed; debited all the same) | GONE (no such hold: committed or released)
local row_key        = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id        = ARGV[1]            -- string, 1..48 bytes
local used_backend   = ARGV[2]            -- gemini | hardware; "" for the one planned
local used_cost      = tonumber(ARGV[3])  -- int > 0, credits; "" for what was held
local lifetime_tiers = ARGV[4]            -- names joined by ",": the tiers whose quota is a lifetime's
local now_arg        = ARGV[5]            -- int, epoch milliseconds; "" for the server's time
--@include clock
--@include calendar
--@include row
--@include debit
--@include holds

if hold_id == "" or (used_cost and (used_cost <= 0 or used_cost % 1 ~= 0)) then
  return redis.error_reply("BADARG commit wants a hold id, and a whole cost above 0 or none")
end
local now_ms, hold_field = clock.now_ms(now_arg), "hold:" .. hold_id
local r, broken = row.read(row_key, hold_field, now_ms)
if broken then return broken end
if not r.hold then return { "GONE", "", "", 0 } end
local held_on, tier_name, counter, held_cost, lapses_ms = holds.parse(r.hold)
if not held_on then return row.broken(row_key, hold_field, r.hold, "text like 'gemini pro monthly 1 1780000000000'") end
local h, broken_hold = holds.read(row_key, r, now_ms)
if broken_hold then return broken_hold end

local backend, cost = used_backend ~= "" and used_backend or held_on, used_cost or held_cost
holds.add(h, -1, held_on, counter, held_cost, lapses_ms, now_ms)
local changes, held = debit.apply(r, tier_name, counter, backend, cost, lifetime_tiers, now_ms), holds.text(h)
if held then
  changes[#changes + 1], changes[#changes + 2] = "held", held
  redis.call("HDEL", row_key, hold_field, unpack(h.dead or {}))
else
  redis.call("HDEL", row_key, hold_field, "held", unpack(h.dead or {}))
end
redis.call("HSET", row_key, unpack(changes))
return { lapses_ms > now_ms and "COMMITTED" or "LATE", tier_name, backend, cost }
