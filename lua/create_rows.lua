#!lua
-- Stores the rows that are not there yet, for an import into a Redis without them; any other row is left alone. Many
-- rows in one call, for an import has millions: as many as others may wait for; in a cluster all of one slot. One step,
-- so that a row that a relay makes meanwhile is never overwritten. The values are stored as they come, checked before.
-- Reply: {status, …}, one for each row   status: CREATED | EXISTS
local row_keys = KEYS  -- hashes; their fields are listed in include/row.lua
local texts    = ARGV  -- one for each row: put_row's values from tier_snapshot to extra, in its order, a line each
-- The fields that come after the eight that each row has. An empty line is not stored.
local optional = {
  "extra", -- the last one: it alone may have line ends
}

if #row_keys == 0 or #texts ~= #row_keys then
  return redis.error_reply("BADARG create_rows wants a text for each row")
end
-- A row is one argument: each of a call's arguments is an object to the server, and nine of them cost it more than this.
local lines, rows = "^" .. string.rep("([^\n]*)\n", 7 + #optional) .. "(.*)$", {}
for i, text in ipairs(texts) do
  rows[i] = { string.match(text, lines) }
  if not rows[i][1] then
    return redis.error_reply("BADARG create_rows wants " .. 8 + #optional .. " lines for each row")
  end
end
local all_new = redis.call("EXISTS", unpack(row_keys)) == 0
local none, statuses = {}, {}
for i, row in ipairs(rows) do
  if not all_new and redis.call("EXISTS", row_keys[i]) == 1 then
    statuses[i] = "EXISTS"
  else
    local more, n = none, 0
    for at, name in ipairs(optional) do
      local value = row[8 + at]
      if value ~= "" then
        if n == 0 then more = {} end
        more[n + 1], more[n + 2], n = name, value, n + 2
      end
    end
    -- Written out, for a loop over them costs as much as a tenth of the script.
    redis.call("HSET", row_keys[i],
      "tier_snapshot", row[1],
      "lifetime_consumed", row[2],
      "lifetime_gemini_consumed", row[3],
      "last_renewal_at", row[4],
      "anniversary_day", row[5],
      "monthly_consumed", row[6],
      "monthly_gemini_consumed", row[7],
      "last_active_at", row[8],
      unpack(more))
    statuses[i] = "CREATED"
  end
end
return statuses
