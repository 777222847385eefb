-- The charge of a row. The first monthly one of a row whose last tier was a lifetime tier promotes it: the billing
-- period is anchored to now, unless the running one was used already, or a credit spent under core would buy a fresh month.
-- Only then is the last tier looked up: to read a field with each row costs the server 2 % of a decision.
-- Takes: row_key, counter, consumed, gemini_consumed, cost, backend, lifetime_tiers, changes, now_iso
-- Gives: consumed, gemini_consumed, changes (all after the charge), promoted
local promoted = counter == "monthly" and consumed == 0 and gemini_consumed == 0
if promoted then
  local last_tier = redis.call("HMGET", row_key, "tier_snapshot")[1] or "core"
  promoted = string.find("," .. lifetime_tiers .. ",", "," .. last_tier .. ",", 1, true)
end
if promoted then
  changes = changes or {}
  changes[#changes + 1], changes[#changes + 2] = "last_renewal_at", now_iso
  changes[#changes + 1], changes[#changes + 2] = "anniversary_day", tonumber(string.sub(now_iso, 9, 10))
end
consumed = consumed + cost
if consumed > 9007199254740991 then consumed = 9007199254740991 end
if backend == "gemini" then
  gemini_consumed = gemini_consumed + cost
  if gemini_consumed > 9007199254740991 then gemini_consumed = 9007199254740991 end
end
