-- A hold to be placed beside the others: its text and the row's new `held`. Text is joined where it can be: to print a
-- number takes longer than the whole plan.
-- Takes: backend, tier_name, counter, cost, cost_arg, hold_ms, now_ms, others, live, held_credits
-- Gives: text, sums, held_credits (with this hold)
held_credits = held_credits + cost
local until_ms = string.format("%d", now_ms + hold_ms)
local on_gemini, sums = backend == "gemini" and cost_arg or "0", nil
if others then
  local column = counter == "monthly" and 5 or 3
  others[1], others[column], others[column + 1] = live + 1, held_credits, others[column + 1] + on_gemini
  if others[7] + 0 > now_ms + hold_ms then others[7] = until_ms end
  sums = table.concat(others, " ")
elseif counter == "monthly" then
  sums = "1 0 0 0 " .. cost_arg .. " " .. on_gemini .. " " .. until_ms
else
  sums = "1 0 " .. cost_arg .. " " .. on_gemini .. " 0 0 " .. until_ms
end
local text = backend .. " " .. tier_name .. " " .. counter .. " " .. cost_arg .. " " .. until_ms
