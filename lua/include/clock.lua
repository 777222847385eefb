-- The time that a script goes by.
local clock = {}

-- An argument's epoch milliseconds, or the server's own when it is empty, so that no relay's clock matters.
function clock.now_ms(argument)
  if argument ~= "" then return tonumber(argument) end
  local time = redis.call("TIME")
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
