-- The time that a script uses: the argument's, or the server's own when it is empty or left out, so that no relay's
-- clock matters.
-- Takes: now_arg
-- Gives: now_ms
local now_ms
if not now_arg or now_arg == "" then
  local time = redis.call("TIME")
  local us = time[2] + 0
  now_ms = time[1] * 1000 + (us - us % 1000) / 1000
else
  now_ms = tonumber(now_arg)
end
