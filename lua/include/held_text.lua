-- The field `held` of a row with these holds: see include/holds.lua.
-- Takes: live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms
-- Gives: held_text
local held_text = live .. " " .. expired .. " " .. held_lifetime .. " " .. held_lifetime_gemini .. " " .. held_monthly
  .. " " .. held_monthly_gemini .. " " .. recount_ms
