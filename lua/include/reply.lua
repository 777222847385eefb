-- The reply of every script that plans: a flat array, false where there is no quota or no cap.
-- Takes: status, reason, backend, quota, gemini_cap, consumed, gemini_consumed, held_credits, renews_ms, began, now_ms,
--   rate_wait
-- Gives: nothing (it returns)
local remaining, gemini_remaining = quota and quota - consumed, gemini_cap and gemini_cap - gemini_consumed
if remaining and remaining < 0 then remaining = 0 end
if gemini_remaining and gemini_remaining < 0 then gemini_remaining = 0 end
return { status, reason, backend, remaining, gemini_remaining, held_credits, renews_ms, began, now_ms, rate_wait }
