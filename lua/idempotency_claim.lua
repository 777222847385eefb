#!lua
-- Claims an idempotency key for one attempt, or returns the outcome of an earlier attempt. One step, so that of
-- attempts on any number of nodes at once only one goes on. Where clients number their attempts instead of naming the
-- request, the outcome of one request is returned once to each attempt number, in rising order: another request that
-- looks the same has numbers of its own. An answer is returned to five attempts at once, then to one every 12 s (GCRA).
-- Reply: {status, answer, wait_ms}
--   status: CLAIMED | RUNNING (another attempt has it) | KEPT (it was served: answer is what it got) | SPENT (it was
--   served, and its answer not kept) | LIMITED (its answer was returned too often: again in wait_ms) | BUSY (another
--   attempt has it, for another request) | REUSED (it was served, for another request); answer is "" but for KEPT, and
--   wait_ms 0 but for LIMITED
local claim_key   = KEYS[1]            -- hash: owner, fingerprint, begun_ms, busy_until_ms, answer, attempt, taker, replays_ms
local owner       = ARGV[1]            -- string, 1..64 bytes: this attempt
local fingerprint = ARGV[2]            -- string, 1..64 bytes: what is requested
local claim_ms    = tonumber(ARGV[3])  -- int > 0, milliseconds until the claim expires
local attempt     = tonumber(ARGV[4])  -- int >= 0, the attempt's number; "" where the key names the request
local missed_ms   = tonumber(ARGV[5])  -- int >= 0, milliseconds since its first attempt ended unclaimed; "" if none did
local now_arg     = ARGV[6]            -- int, epoch milliseconds; "" for the server's time

if owner == "" or fingerprint == "" or not (claim_ms and claim_ms > 0) then
  return redis.error_reply("BADARG idempotency_claim wants an owner, a fingerprint, and a time above 0")
end
--@include clock -> now_ms
local number = attempt and string.format("%.0f", attempt) or ""
local f = redis.call("HMGET", claim_key, "owner", "fingerprint", "busy_until_ms", "replays_ms", "attempt", "taker", "begun_ms")
local theirs = f[1] and f[1] ~= owner
if theirs and attempt and f[6] ~= owner then -- the taker retries when its reply was lost
  local taken = attempt <= (tonumber(f[5]) or 0)
  local older = missed_ms and (tonumber(f[7]) or 0) < now_ms - missed_ms
  theirs = not (taken or older)
end
if theirs then
  local runs = (tonumber(f[3]) or 0) > now_ms
  if f[2] ~= fingerprint then return { runs and "BUSY" or "REUSED", "", 0 } end
  if runs then return { "RUNNING", "", 0 } end
  local replays_ms = math.max(tonumber(f[4]) or 0, now_ms) + 12000 -- until then the replays so far use the limit up
  if replays_ms > now_ms + 60000 then return { "LIMITED", "", replays_ms - now_ms - 60000 } end
  if attempt then redis.call("HSET", claim_key, "attempt", number, "taker", owner) end
  local answer = redis.call("HMGET", claim_key, "answer")[1] or ""
  if answer == "" then return { "SPENT", "", 0 } end
  redis.call("HSET", claim_key, "replays_ms", string.format("%.0f", replays_ms))
  return { "KEPT", answer, 0 }
end
redis.call("HSET", claim_key, "owner", owner, "fingerprint", fingerprint, "begun_ms", string.format("%.0f", now_ms),
  "busy_until_ms", string.format("%.0f", now_ms + claim_ms), "answer", "", "attempt", number, "taker", "",
  "replays_ms", "")
redis.call("PEXPIRE", claim_key, claim_ms)
return { "CLAIMED", "", 0 }
