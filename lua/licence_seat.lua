#!lua
-- Takes one of a licence's seats for an install, or records that the install uses the one it has. One step, so that
-- concurrent installs never get more seats than there are.
-- Reply: {status}   status: SEATED | FULL (others have all the seats)
local seats_key  = KEYS[1]            -- hash: install id -> "1780000000000 1780000000000", seated and last used at
local install_id = ARGV[1]            -- string, 1..64 bytes
local seats      = tonumber(ARGV[2])  -- int > 0, installs that may use the licence
local expires_ms  = tonumber(ARGV[3])  -- int > 0, epoch milliseconds: when its seats are forgotten
local now_arg    = ARGV[4]            -- int, epoch milliseconds; "" for the server's time

if install_id == "" or not (seats and seats > 0 and expires_ms and expires_ms > 0) then
  return redis.error_reply("BADARG licence_seat wants an install, and seats and a time above 0")
end
--@include clock -> now_ms
local taken = redis.call("HLEN", seats_key)
local since = string.match(redis.call("HGET", seats_key, install_id) or "", "^(%d+) ")
if not since then
  if taken >= seats then return { "FULL" } end
elseif taken > seats then
  -- The licence has fewer seats than the one before it: those who came first keep theirs.
  local ahead, all = 0, redis.call("HGETALL", seats_key)
  for i = 1, #all, 2 do
    local other = tonumber(string.match(all[i + 1], "^(%d+) ")) or 0
    if other < tonumber(since) or other == tonumber(since) and all[i] < install_id then ahead = ahead + 1 end
  end
  if ahead >= seats then return { "FULL" } end
end
local now = string.format("%.0f", now_ms)
redis.call("HSET", seats_key, install_id, (since or now) .. " " .. now)
redis.call("PEXPIREAT", seats_key, string.format("%.0f", expires_ms), taken == 0 and "NX" or "GT")
return { "SEATED" }
