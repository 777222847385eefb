-- One install's row: read, checked, rolled over to now. Its fields:
--   tier_snapshot                                    tier of the last committed request
--   lifetime_consumed, lifetime_gemini_consumed      credits, ever
--   monthly_consumed, monthly_gemini_consumed        credits, this billing period
--   last_renewal_at, last_active_at                  2026-05-11T23:02:57.123Z
--   anniversary_day                                  1..31
--   held, hold:<hold_id>                             see include/holds.lua
--   extra                                            JSON, never read here
local row = {}

-- The error for a row that somebody broke, with the beginning of what stands there. It is given before any write.
function row.broken(key, field, value, want)
  local shown = string.gsub(string.sub(value, 1, 80), "%c", " ")
  return redis.error_reply("BADROW " .. key .. " field " .. field .. " is '" .. shown .. "', want " .. want)
end

-- The row as it stands at now_ms; `hold` is the text of the field hold_field, or false. Without a row: a new one of
-- now, with `created` set. `moved` tells that row.changes has something to store. Second result: an error reply.
function row.read(key, hold_field, now_ms)
  local f = redis.call("HMGET", key, "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
    "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "tier_snapshot", "held", hold_field)
  local lifetime, lifetime_gemini, monthly, monthly_gemini = f[1] or "0", f[2] or "0", f[3] or "0", f[4] or "0"
  -- One search over all four counters; only a suspicious or a very large one is looked at by itself.
  local digits = lifetime .. "," .. lifetime_gemini .. "," .. monthly .. "," .. monthly_gemini
  if #digits > 18 or not string.find(digits, "^%d+,%d+,%d+,%d+$") then
    for i, name in ipairs({ "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
      "monthly_gemini_consumed" }) do
      if f[i] and not (string.find(f[i], "^%d+$") and tonumber(f[i]) <= 9007199254740991) then
        return nil, row.broken(key, name, f[i], "an integer from 0 to 2^53 - 1")
      end
    end
  end

  local began, created, anniversary_day = f[5], false, f[6] and tonumber(string.match(f[6], "^%d+$"))
  if not began and redis.call("EXISTS", key) == 0 then began, created = calendar.iso(now_ms), true end
  if f[6] and not (anniversary_day and anniversary_day >= 1 and anniversary_day <= 31) then
    return nil, row.broken(key, "anniversary_day", f[6], "an integer from 1 to 31")
  end
  local renews_ms, began_ms, day = calendar.period(began or "", anniversary_day, now_ms)
  if not renews_ms then
    return nil, row.broken(key, "last_renewal_at", began or "", "a time like 2026-05-11T23:02:57.123Z")
  end
  if began_ms then began, monthly, monthly_gemini = calendar.iso(began_ms), 0, 0 end
  return {
    lifetime_consumed = tonumber(lifetime), lifetime_gemini_consumed = tonumber(lifetime_gemini),
    monthly_consumed = tonumber(monthly), monthly_gemini_consumed = tonumber(monthly_gemini),
    last_renewal_at = began, anniversary_day = anniversary_day or day, renews_ms = renews_ms,
    tier_snapshot = f[7] or "core", held = f[8], hold = f[9],
    created = created, moved = created or began_ms or not anniversary_day,
  }
end

-- The fields and values that reading moved: all of a created row, the period of one that rolled over, else none.
function row.changes(r, now_ms)
  if not r.moved then return {} end
  local changes = {
    "last_renewal_at", r.last_renewal_at, "anniversary_day", r.anniversary_day,
    "monthly_consumed", r.monthly_consumed, "monthly_gemini_consumed", r.monthly_gemini_consumed,
  }
  if r.created then
    for _, item in ipairs({ "tier_snapshot", "core", "lifetime_consumed", 0, "lifetime_gemini_consumed", 0,
      "last_active_at", calendar.iso(now_ms) }) do
      changes[#changes + 1] = item
    end
  end
  return changes
end
