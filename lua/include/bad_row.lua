-- The error for an invalid row, with the beginning of the field that is wrong. It is returned before any write.
-- Takes: nothing
-- Gives: bad_row
local function bad_row(key, field, value, want)
  local shown = string.gsub(string.sub(value, 1, 80), "%c", " ")
  return redis.error_reply("BADROW " .. key .. " field " .. field .. " is '" .. shown .. "', want " .. want)
end
