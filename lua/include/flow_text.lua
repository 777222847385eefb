-- The field `flow` of a row: see include/flow.lua.
-- Takes: rate_until, left_until, marks, marks_recount
-- Gives: flow_text (text, or a number that the server prints faster than Lua)
local flow_text = rate_until
if left_until ~= "0" or marks_recount ~= "0" then
  flow_text = string.format("%d %s %s %s", rate_until, left_until, marks, marks_recount)
end
