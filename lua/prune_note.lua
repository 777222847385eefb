#!lua
-- Notes how many rows a prune deleted, for the next dump, which has fewer rows. One step, so that the notes always expire.
-- Reply: {status}   status: NOTED
local pruned_key = KEYS[1]            -- hash: part -> "1780000000000 250", when it was noted and its rows; has a TTL
local part       = ARGV[1]            -- string, 1..64 bytes: some time of one prune
local rows       = tonumber(ARGV[2])  -- int >= 0, rows that were deleted in that time, or are about to be
local keep_ms    = tonumber(ARGV[3])  -- int > 0, milliseconds until a note is dropped
local now_arg    = ARGV[4]            -- int, epoch milliseconds; "" for the server's time

if part == "" or not (rows and rows >= 0 and keep_ms and keep_ms > 0) then
  return redis.error_reply("BADARG prune_note wants a part, its rows, and a time above 0")
end
--@include clock -> now_ms
local notes = redis.call("HGETALL", pruned_key)
for i = 1, #notes, 2 do
  local noted_ms = tonumber(string.match(notes[i + 1], "^(%d+) "))
  if not noted_ms or noted_ms + keep_ms <= now_ms then redis.call("HDEL", pruned_key, notes[i]) end
end
redis.call("HSET", pruned_key, part, string.format("%.0f %.0f", now_ms, rows))
redis.call("PEXPIRE", pruned_key, string.format("%.0f", keep_ms))
return { "NOTED" }
