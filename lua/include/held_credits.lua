-- The credits that live holds cover, of the counter that a tier's quota counts.
-- Takes: counter, live, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini
-- Gives: held_credits, held_on_gemini
local held_credits, held_on_gemini = 0, 0
if live and counter == "monthly" then
  held_credits, held_on_gemini = held_monthly + 0, held_monthly_gemini + 0
elseif live then
  held_credits, held_on_gemini = held_lifetime + 0, held_lifetime_gemini + 0
end
