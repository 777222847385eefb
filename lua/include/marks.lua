-- The marks of a row's streams and left requests, counted again once one of them has expired. One that expired a grace
-- time ago is dropped: until then the lease of its stream can still be renewed.
-- Takes: row_key, now_ms, bad_row, marks, marks_recount
-- Gives: marks, marks_recount, dead_marks (fields to drop, or nil)
local dead_marks
if marks_recount ~= "0" and marks_recount + 0 <= now_ms then
  local running, next_ms, fields = 0, math.huge, redis.call("HGETALL", row_key)
  dead_marks = {}
  for i = 1, #fields, 2 do
    local kind = string.match(fields[i], "^(%l+):")
    if kind == "run" or kind == "left" then
      local until_ms = tonumber(string.match(fields[i + 1], "^(%d+)"))
      if not until_ms then return bad_row(row_key, fields[i], fields[i + 1], "text like '1780000000000'") end
      if until_ms > now_ms then
        if kind == "run" then running = running + 1 end
      elseif kind == "run" and until_ms + 3600000 > now_ms then
        until_ms = until_ms + 3600000
      elseif #dead_marks < 1000 then -- as in include/holds.lua
        dead_marks[#dead_marks + 1], until_ms = fields[i], math.huge
      else
        until_ms = 1
      end
      next_ms = math.min(next_ms, until_ms)
    end
  end
  marks, marks_recount = running, next_ms < math.huge and string.format("%d", next_ms) or "0"
  if #dead_marks == 0 then dead_marks = nil end
end
