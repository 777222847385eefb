-- The debit of a row.
local debit = {}

-- Counts cost credits, and gives the fields and values to store. The first monthly debit of a row whose last tier
-- was a lifetime tier promotes it: the billing period is anchored to now, unless the running one was used already,
-- or a credit spent under core would buy a fresh month.
function debit.apply(r, tier_name, counter, backend, cost, lifetime_tiers, now_ms)
  local now_iso = calendar.iso(now_ms)
  if counter == "monthly" and r.monthly_consumed == 0 and r.monthly_gemini_consumed == 0
    and string.find("," .. lifetime_tiers .. ",", "," .. r.tier_snapshot .. ",", 1, true) then
    r.last_renewal_at, r.anniversary_day, r.moved = now_iso, tonumber(string.sub(now_iso, 9, 10)), true
    r.renews_ms = calendar.period(now_iso, r.anniversary_day, now_ms)
  end
  local consumed, gemini_consumed = counter .. "_consumed", counter .. "_gemini_consumed"
  r[consumed] = math.min(r[consumed] + cost, 9007199254740991)
  if backend == "gemini" then r[gemini_consumed] = math.min(r[gemini_consumed] + cost, 9007199254740991) end
  local changes = row.changes(r, now_ms)
  local n = #changes
  changes[n + 1], changes[n + 2], changes[n + 3], changes[n + 4] = consumed, r[consumed], gemini_consumed, r[gemini_consumed]
  changes[n + 5], changes[n + 6], changes[n + 7], changes[n + 8] = "tier_snapshot", tier_name, "last_active_at", now_iso
  return changes
end
