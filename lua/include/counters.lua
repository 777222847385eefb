-- The two counters of a row that a tier's quota counts, and the names of their fields.
-- Takes: counter, lifetime, lifetime_gemini, monthly, monthly_gemini
-- Gives: consumed, gemini_consumed, consumed_field, gemini_consumed_field
local consumed, gemini_consumed, consumed_field, gemini_consumed_field
if counter == "monthly" then
  consumed, gemini_consumed = monthly + 0, monthly_gemini + 0
  consumed_field, gemini_consumed_field = "monthly_consumed", "monthly_gemini_consumed"
else
  consumed, gemini_consumed = lifetime + 0, lifetime_gemini + 0
  consumed_field, gemini_consumed_field = "lifetime_consumed", "lifetime_gemini_consumed"
end
