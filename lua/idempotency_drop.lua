#!lua flags=allow-oom
-- Drops the claim of an attempt that was not served, so that the key can be used again. One step, so that it cannot
-- drop the claim of another attempt, nor one that was served.
-- Reply: {status}   status: DROPPED | GONE (no such claim: dropped, expired, or another attempt has it) | KEPT (served)
local claim_key = KEYS[1]  -- hash, see idempotency_claim.lua; always with a TTL
local owner     = ARGV[1]  -- string, 1..64 bytes: this attempt

if owner == "" then return redis.error_reply("BADARG idempotency_drop wants an owner") end
local f = redis.call("HMGET", claim_key, "owner", "busy_until_ms")
if f[1] ~= owner then return { "GONE" } end
if f[2] == "0" then return { "KEPT" } end
redis.call("DEL", claim_key)
return { "DROPPED" }
