-- What a tier allows. Pure. A refusal that lasts comes before one that passes. A nil quota, cap or limit means none. A
-- backend that cannot serve the request is left out here, and not after: its cap would be held by what it never serves.
-- Takes: consumed, gemini_consumed, held_credits, held_on_gemini, live, quota, gemini_cap, max_in_flight, cost,
--   has_hardware, has_gemini, marks, rate_wait, enforces_rate
-- Gives: backend (or "" and the reason), reason
local backend, reason = "", ""
local wanted, wanted_on_gemini = consumed + cost, gemini_consumed + cost
if quota and wanted > quota then
  reason = "out_of_credits"
elseif gemini_cap and wanted_on_gemini > gemini_cap and not has_hardware then
  reason = "gemini_cap_exceeded_no_hardware"
elseif enforces_rate and rate_wait > 0 then
  reason = "rate_limited"
elseif max_in_flight and (live or marks ~= "0") and (live or 0) + marks >= max_in_flight then
  reason = "too_many_in_flight"
elseif quota and wanted + held_credits > quota then
  reason = "credits_in_flight"
elseif has_gemini and (not gemini_cap or wanted_on_gemini + held_on_gemini <= gemini_cap) then
  backend = "gemini"
elseif has_hardware then
  backend = "hardware"
else
  reason = "credits_in_flight"
end
