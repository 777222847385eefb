#!lua
-- Records on a claim that its attempt was served, with the answer: idempotency_record.lua where there is memory for it.
-- One step, so that it cannot overwrite the claim of another attempt.
-- Reply: {status}   status: KEPT | LOST (another attempt has the claim: nothing is noted)
local claim_key   = KEYS[1]            -- hash, see idempotency_claim.lua; always with a TTL
local owner       = ARGV[1]            -- string, 1..64 bytes: this attempt
local fingerprint = ARGV[2]            -- string, 1..64 bytes: what is requested
local answer      = ARGV[3]            -- bytes, packed
local keep_ms     = tonumber(ARGV[4])  -- int > 0, milliseconds until the key is forgotten
local now_arg     = ARGV[5]            -- int, epoch milliseconds; "" for the server's time

if owner == "" or fingerprint == "" or not (keep_ms and keep_ms > 0) then
  return redis.error_reply("BADARG idempotency_keep wants an owner, a fingerprint, and a time above 0")
end
--@include clock -> now_ms
local busy_ms = 0
--@include served -> has_claim
return { has_claim and "KEPT" or "LOST" }
