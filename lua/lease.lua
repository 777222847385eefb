#!lua flags=allow-oom
-- Takes, renews or returns the lease of the one persister that may replace the ledger file. One step, so that two never
-- have it. Each change of owner raises the epoch, and every file carries the epoch of its writer.
-- Reply: {status, epoch, owner, checksum, good_at}   status: LEASED | STANDBY (another has it) | RETURNED
local lease_key   = KEYS[1]            -- hash: owner, epoch, lapses_ms, checksum, good_at; always with a TTL
local owner       = ARGV[1]            -- string, 1..96 bytes: this persister
local least_epoch = tonumber(ARGV[2])  -- int >= 0, of the file there is: a new epoch is larger
local lease_ms    = tonumber(ARGV[3])  -- int >= 0, milliseconds until the lease expires; 0 returns it
local checksum    = ARGV[4]            -- string, of the file about to be published; "" keeps what is stored
local good_at     = ARGV[5]            -- time of the last good dump; "" keeps what is stored
local now_arg     = ARGV[6]            -- int, epoch milliseconds; "" for the server's time

if owner == "" or not (least_epoch and least_epoch >= 0 and lease_ms and lease_ms >= 0) then
  return redis.error_reply("BADARG lease wants an owner, an epoch from 0 and a time from 0")
end
--@include clock -> now_ms
local f = redis.call("HMGET", lease_key, "owner", "epoch", "lapses_ms", "checksum", "good_at")
local epoch, is_own = tonumber(f[2]) or 0, f[1] == owner
if not is_own and (tonumber(f[3]) or 0) > now_ms then return { "STANDBY", epoch, f[1], f[4] or "", f[5] or "" } end
if lease_ms == 0 and not is_own then return { "RETURNED", epoch, "", f[4] or "", f[5] or "" } end

if not is_own or epoch < least_epoch then epoch = math.max(epoch, least_epoch) + 1 end
checksum, good_at = checksum ~= "" and checksum or f[4] or "", good_at ~= "" and good_at or f[5] or ""
redis.call("HSET", lease_key, "owner", owner, "epoch", string.format("%.0f", epoch),
  "lapses_ms", lease_ms == 0 and "0" or string.format("%.0f", now_ms + lease_ms), "checksum", checksum, "good_at", good_at)
-- The epoch and the checksum outlive the lease, and what outlives them is in the file: epochs go on from there.
redis.call("PEXPIRE", lease_key, lease_ms + 2592000000)
return { lease_ms == 0 and "RETURNED" or "LEASED", epoch, owner, checksum, good_at }
