#!lua flags=allow-oom
-- Gives a hold back: its credits are free again. One step, so that a repeat finds no hold and changes nothing.
-- Reply: {status}   status: RELEASED | GONE (no such hold: committed or released before)
local row_key = KEYS[1]  -- hash; its fields are listed in include/row.lua
local hold_id = ARGV[1]  -- string, 1..48 bytes
local now_arg = ARGV[2]  -- int, epoch milliseconds; "" for the server's time
--@include clock
--@include calendar
--@include row
--@include holds

if hold_id == "" then return redis.error_reply("BADARG release wants a hold id") end
local now_ms, hold_field = clock.now_ms(now_arg), "hold:" .. hold_id
local f = redis.call("HMGET", row_key, "held", hold_field)
local r = { held = f[1], hold = f[2] }
if not r.hold then return { "GONE" } end
local held_on, _, counter, cost, lapses_ms = holds.parse(r.hold)
if not held_on then return row.broken(row_key, hold_field, r.hold, "text like 'gemini pro monthly 1 1780000000000'") end
local h, broken = holds.read(row_key, r, now_ms)
if broken then return broken end

holds.add(h, -1, held_on, counter, cost, lapses_ms, now_ms)
local held = holds.text(h)
redis.call("HDEL", row_key, hold_field, not held and "held" or hold_field, unpack(h.dead or {}))
if held then redis.call("HSET", row_key, "held", held) end
return { "RELEASED" }
