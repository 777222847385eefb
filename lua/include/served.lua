-- Records on a claim that its attempt was served, unless another attempt has the claim, or it was recorded before.
-- Takes: claim_key, owner, fingerprint, busy_ms, answer, keep_ms, now_ms
-- Gives: has_claim
local claimed = redis.call("HMGET", claim_key, "owner", "busy_until_ms")
local has_claim = not claimed[1] or claimed[1] == owner
if has_claim and claimed[2] ~= "0" then -- 0: recorded before, and this is a repeat, or a note that comes late
  redis.call("HSET", claim_key, "owner", owner, "fingerprint", fingerprint,
    "busy_until_ms", busy_ms == 0 and "0" or string.format("%.0f", now_ms + busy_ms), "answer", answer)
  redis.call("PEXPIRE", claim_key, keep_ms)
end
