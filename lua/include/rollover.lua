-- The rows that include/row.lua leaves: each field checked by itself, a missing row as a new one of now, rolled over to now.
-- Takes: row_key, now_ms, f, bad_row, now_iso, civil, renewal_ms
-- Gives: lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created (if there is no
--   row), changes (fields and values, if there is something to store)
for i, name in ipairs({ "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed" }) do
  if f[i] and not (string.find(f[i], "^%d+$") and tonumber(f[i]) <= 9007199254740991) then
    return bad_row(row_key, name, f[i], "an integer from 0 to 2^53 - 1")
  end
end
lifetime, lifetime_gemini, monthly, monthly_gemini = f[1] or "0", f[2] or "0", f[3] or "0", f[4] or "0"

if not f[5] and redis.call("EXISTS", row_key) == 0 then created, began = true, now_iso end
local month, day, ms_of_day = civil(began)
if not month then return bad_row(row_key, "last_renewal_at", began, "a time like 2026-05-11T23:02:57.123Z") end
anniversary_day = tonumber(f[6] and (string.match(f[6], "^%d+$") or "0") or day)
if anniversary_day < 1 or anniversary_day > 31 then
  return bad_row(row_key, "anniversary_day", f[6], "an integer from 1 to 31")
end

renews_ms = renewal_ms(month + 1, anniversary_day, ms_of_day)
local due = now_ms >= renews_ms
if due then
  -- Month arithmetic, over any number of missed months at once: by the mean month now's is at most one off, and the
  -- latest renewal is in that one or in the one before, so that there are three steps back at most.
  local latest = math.floor(now_ms / 2629746000) + 23641
  local latest_ms, latest_day = renewal_ms(latest, anniversary_day, ms_of_day)
  while latest_ms > now_ms do
    latest = latest - 1
    latest_ms, latest_day = renewal_ms(latest, anniversary_day, ms_of_day)
  end
  began = string.format("%04d-%02d-%02d%s.000Z", (latest - latest % 12) / 12, latest % 12 + 1, latest_day,
    string.sub(began, 11, 19))
  monthly, monthly_gemini = "0", "0"
  renews_ms = renewal_ms(latest + 1, anniversary_day, ms_of_day)
end
if created or due or not f[6] then
  changes = { "last_renewal_at", began, "anniversary_day", anniversary_day, "monthly_consumed", monthly,
    "monthly_gemini_consumed", monthly_gemini }
end
if created then
  for _, item in ipairs({ "tier_snapshot", "core", "lifetime_consumed", 0, "lifetime_gemini_consumed", 0,
    "last_active_at", began }) do
    changes[#changes + 1] = item
  end
end
