#!lua
-- Stores the rows that are not there yet, for an import into a Redis without them; any other row is left alone. Many
-- rows in one call, for an import has millions: as many as others may wait for, and in a cluster one. One step, so that
-- a row that a relay makes meanwhile is never overwritten. The values are stored as they come: the caller checked them.
-- Reply: {status, …}, one for each row   status: CREATED | EXISTS
local row_keys = KEYS  -- hashes; their fields are listed in include/row.lua
local values   = ARGV  -- nine for each row: put_row's from tier_snapshot to extra, in its order

if #row_keys == 0 or #values ~= 9 * #row_keys then
  return redis.error_reply("BADARG create_rows wants nine values for each row")
end
local none, statuses = {}, {}
for i, row_key in ipairs(row_keys) do
  if redis.call("EXISTS", row_key) == 1 then
    statuses[i] = "EXISTS"
  else
    local at = 9 * i - 8
    local extra = values[at + 8]
    redis.call("HSET", row_key, "tier_snapshot", values[at], "lifetime_consumed", values[at + 1],
      "lifetime_gemini_consumed", values[at + 2], "last_renewal_at", values[at + 3], "anniversary_day", values[at + 4],
      "monthly_consumed", values[at + 5], "monthly_gemini_consumed", values[at + 6], "last_active_at", values[at + 7],
      unpack(extra == "" and none or { "extra", extra }))
    statuses[i] = "CREATED"
  end
end
return statuses
