-- The error for a row that somebody broke, with the beginning of what stands there. It is given before any write.
-- Takes: nothing
-- Gives: bad_row
local function bad_row(key, field, value, want)
  local shown = string.gsub(string.sub(value, 1, 80), "%c", " ")
  return redis.error_reply("BADROW " .. key .. " field " .. field .. " is '" .. shown .. "', want " .. want)
end
