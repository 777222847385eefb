#!lua
-- Claims an idempotency key for one attempt, or tells what became of the one before. One step, so that of attempts
-- that come to any number of nodes at once one alone goes on.
-- Reply: {status, answer}
--   status: CLAIMED | RUNNING (another attempt has it) | KEPT (it was served: answer is what it said) | SPENT (it was
--   served, and its answer not kept) | REUSED (it was for another request); answer is "" but for KEPT
local claim_key   = KEYS[1]            -- hash: owner, fingerprint, busy_until_ms, answer; always with a TTL
local owner       = ARGV[1]            -- string, 1..64 bytes: this attempt
local fingerprint = ARGV[2]            -- string, 1..64 bytes: what is asked for
local claim_ms    = tonumber(ARGV[3])  -- int > 0, milliseconds until the claim lapses
local supersedes  = ARGV[4] == "1"     -- 1 | 0: whether it takes the place of whatever is there
local now_arg     = ARGV[5]            -- int, epoch milliseconds; "" for the server's time

if owner == "" or fingerprint == "" or not (claim_ms and claim_ms > 0) then
  return redis.error_reply("BADARG claim wants an owner, a fingerprint, and a time above 0")
end
--@include clock
local f = redis.call("HMGET", claim_key, "owner", "fingerprint", "busy_until_ms", "answer")
if f[1] and f[1] ~= owner and not supersedes then
  if f[2] ~= fingerprint then return { "REUSED", "" } end
  if (tonumber(f[3]) or 0) > now_ms then return { "RUNNING", "" } end
  if (f[4] or "") ~= "" then return { "KEPT", f[4] } end
  return { "SPENT", "" }
end
redis.call("HSET", claim_key, "owner", owner, "fingerprint", fingerprint,
  "busy_until_ms", string.format("%.0f", now_ms + claim_ms), "answer", "")
redis.call("PEXPIRE", claim_key, claim_ms)
return { "CLAIMED", "" }
