#!lua
-- Deletes the row of an install that was never debited, holds nothing, and was not used for some time. One step, so that
-- a row that is used meanwhile stays: it is judged as it is now, not as it was when somebody listed it.
-- Reply: {status}   status: PRUNED | KEPT (it was used, holds something, has fields of others, or there is no such row)
local row_key   = KEYS[1]            -- hash; its fields are listed in include/row.lua
local unused_ms = tonumber(ARGV[1])  -- int > 0, milliseconds for which it was not used
local dry_run   = ARGV[2] == "1"     -- 1 | 0: with 1 the reply tells what would be done, and nothing is deleted
local now_arg   = ARGV[3]            -- int, epoch milliseconds; "" for the server's time

if not (unused_ms and unused_ms > 0) then
  return redis.error_reply("BADARG prune_row wants a time above 0")
end
--@include clock -> now_ms
local counters = {
  lifetime_consumed = true, lifetime_gemini_consumed = true, monthly_consumed = true, monthly_gemini_consumed = true,
}
local others = {
  tier_snapshot = true, last_renewal_at = true, last_active_at = true, anniversary_day = true, held = true, flow = true,
}
local row, fields = {}, redis.call("HGETALL", row_key)
for i = 1, #fields, 2 do
  local name, value = fields[i], fields[i + 1]
  row[name] = value
  if string.sub(name, 1, 5) == "hold:" then
    -- An hour after it expired it cannot be committed any more, and holds nothing.
    local until_ms = tonumber(string.match(value, " (%d+)$"))
    if not until_ms or until_ms + 3600000 > now_ms then return { "KEPT" } end
  elseif counters[name] and value ~= "0" or not counters[name] and not others[name] then
    return { "KEPT" }
  end
end
now_ms = now_ms - unused_ms
--@include now_iso -> now_iso
local began, active = row.last_renewal_at or "", row.last_active_at or ""
if #began ~= 24 or #active ~= 24 or began > now_iso or active > now_iso then return { "KEPT" } end
-- A new row has one time for both, and a renewal keeps the time of day. A commit changes the second one, and stays to be
-- seen in it when a new period has put its counters back to 0; so does its tier.
if string.sub(began, 12, 19) ~= string.sub(active, 12, 19) or row.tier_snapshot ~= "core" then return { "KEPT" } end
if not dry_run then redis.call("DEL", row_key) end
return { "PRUNED" }
