-- What live holds take of one tier.
-- Takes: counter, others
-- Gives: live (holds of any tier), held_credits, held_on_gemini (credits of the counter that the tier goes by)
local live, held_credits, held_on_gemini = 0, 0, 0
if others then
  local column = counter == "monthly" and 5 or 3
  live, held_credits, held_on_gemini = others[1] + 0, others[column] + 0, others[column + 1] + 0
end
