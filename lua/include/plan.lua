-- What a tier allows. Pure. A nil quota, cap or limit stands for none.
local plan = {}

-- The backend for a request of cost credits, or false and the reason. What stays refused is told before what passes.
function plan.decide(r, h, counter, quota, gemini_cap, max_in_flight, cost, has_hardware)
  local consumed, gemini_consumed = r[counter .. "_consumed"] + cost, r[counter .. "_gemini_consumed"] + cost
  if quota and consumed > quota then return false, "out_of_credits" end
  if gemini_cap and gemini_consumed > gemini_cap and not has_hardware then
    return false, "gemini_cap_exceeded_no_hardware"
  end
  if max_in_flight and h.live >= max_in_flight then return false, "too_many_in_flight" end
  if quota and consumed + h[counter] > quota then return false, "credits_in_flight" end
  if not gemini_cap or gemini_consumed + h[counter .. "_gemini"] <= gemini_cap then return "gemini", "" end
  if has_hardware then return "hardware", "" end
  return false, "credits_in_flight"
end

-- The reply of every script that plans: a flat array, false where there is no quota or no cap.
function plan.reply(status, reason, backend, r, h, counter, quota, gemini_cap, now_ms)
  return { status, reason, backend or "",
    quota and math.max(0, quota - r[counter .. "_consumed"]) or false,
    gemini_cap and math.max(0, gemini_cap - r[counter .. "_gemini_consumed"]) or false,
    h[counter], r.renews_ms, r.last_renewal_at, now_ms }
end
