-- A hold to be placed beside the others: its text, and what `held` says with it. Text is joined where it can be: to
-- print a number takes longer than the whole plan.
-- Takes: backend, tier_name, counter, cost, cost_arg, hold_ms, now_ms, held_credits, held_on_gemini, live,
--   recount_ms
-- Gives: hold_text, held_credits, live, expired, held_lifetime, held_lifetime_gemini, held_monthly,
--   held_monthly_gemini, recount_ms (all with this hold)
held_credits = held_credits + cost
local until_ms = string.format("%d", now_ms + hold_ms)
local on_gemini = backend == "gemini" and cost_arg or "0"
local hold_text = backend .. " " .. tier_name .. " " .. counter .. " " .. cost_arg .. " " .. until_ms
if live then
  live = live + 1
  if recount_ms + 0 > now_ms + hold_ms then recount_ms = until_ms end
  if counter == "monthly" then
    held_monthly, held_monthly_gemini = held_credits, held_on_gemini + on_gemini
  else
    held_lifetime, held_lifetime_gemini = held_credits, held_on_gemini + on_gemini
  end
else
  live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini = "1", "0", "0", "0", "0", "0"
  recount_ms = until_ms
  if counter == "monthly" then
    held_monthly, held_monthly_gemini = cost_arg, on_gemini
  else
    held_lifetime, held_lifetime_gemini = cost_arg, on_gemini
  end
end
