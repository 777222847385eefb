#!lua flags=allow-oom
-- Renews the lease of a stream that still runs, or ends it: the mark that commit.lua left counts as in flight until then.
-- Reply: {status}   status: RENEWED | ENDED | GONE (no such mark: it ended before, or its lease did an hour ago)
local row_key  = KEYS[1]       -- hash; its fields are listed in include/row.lua
local hold_id  = ARGV[1]       -- string, 1..48 bytes
local lease_ms = ARGV[2] + 0   -- int >= 0, milliseconds until the lease ends; 0 ends it now
local now_arg  = ARGV[3]       -- int, epoch milliseconds; "" for the server's time
if hold_id == "" or lease_ms < 0 then return redis.error_reply("BADARG stream wants a hold id, and a lease of 0 or more") end
local mark_field = "run:" .. hold_id
local f = redis.call("HMGET", row_key, mark_field, "flow")
local mark, flow = f[1], f[2]
if not mark then return { "GONE" } end
--@include clock -> now_ms
--@include bad_row -> bad_row
local until_ms = tonumber(mark)
if not until_ms then return bad_row(row_key, mark_field, mark, "text like '1780000000000'") end
--@include flow -> rate_until, left_until, marks, marks_recount
if lease_ms > 0 then
  redis.call("HSET", row_key, mark_field, string.format("%d", now_ms + lease_ms))
  if until_ms > now_ms then return { "RENEWED" } end -- it is counted already, to be counted again at the earliest time
  marks_recount = "1" -- at the next decision: it had expired, and counts again
else
  redis.call("HDEL", row_key, mark_field)
  if marks_recount + 0 <= now_ms or until_ms <= now_ms then return { "ENDED" } end
  marks = marks > "0" and marks - 1 or "0"
end
--@include flow_text -> flow_text
redis.call("HSET", row_key, "flow", flow_text)
return { lease_ms > 0 and "RENEWED" or "ENDED" }
