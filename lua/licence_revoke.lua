#!lua
-- Revokes a customer's licences or one licence, or restores them: an entry of the list that every relay reads. One step,
-- so that each change of the list has a version of its own, and the list never outgrows its limit.
-- Reply: {status}   status: REVOKED | RESTORED | GONE (it was not revoked) | FULL (as many are revoked as the limit says)
local revoked_key = KEYS[1]            -- hash: name -> "1780000000000 1790000000000", revoked and forgotten at; has a TTL
local name        = ARGV[1]            -- string, 1..512 bytes: a licence's subject or id
local expires_ms  = tonumber(ARGV[2])  -- int >= 0, epoch milliseconds: when it is forgotten; 0 restores it
local version     = ARGV[3]            -- string, 1..64 bytes, another one for each call; the hash has it under ""
local limit       = tonumber(ARGV[4])  -- int > 0, names on the list
local now_arg     = ARGV[5]            -- int, epoch milliseconds; "" for the server's time

if name == "" or version == "" or not (expires_ms and expires_ms >= 0 and limit and limit > 0) then
  return redis.error_reply("BADARG licence_revoke wants a name and a version, a time, and a limit above 0")
end
--@include clock -> now_ms
local since, count, last_ms = nil, 0, expires_ms
local fields = redis.call("HGETALL", revoked_key)
for i = 1, #fields, 2 do
  local revoked_ms, until_ms = string.match(fields[i + 1], "^(%d+) (%d+)$")
  if until_ms and tonumber(until_ms) <= now_ms then
    redis.call("HDEL", revoked_key, fields[i])
  elseif until_ms then
    count = count + 1
    if fields[i] == name then since = revoked_ms end
    last_ms = math.max(last_ms, tonumber(until_ms))
  end
end
if expires_ms == 0 then
  if not since then return { "GONE" } end
  redis.call("HDEL", revoked_key, name)
  if count == 1 then
    redis.call("DEL", revoked_key)
  else
    redis.call("HSET", revoked_key, "", version)
  end
  return { "RESTORED" }
end
if not since and count >= limit then return { "FULL" } end
since = since or string.format("%.0f", now_ms)
redis.call("HSET", revoked_key, name, since .. " " .. string.format("%.0f", expires_ms), "", version)
redis.call("PEXPIREAT", revoked_key, string.format("%.0f", last_ms))
return { "REVOKED" }
