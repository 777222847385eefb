-- One install's row. Its fields:
--   tier_snapshot                                    tier of the last committed request: see include/charge.lua
--   lifetime_consumed, lifetime_gemini_consumed      credits, ever
--   monthly_consumed, monthly_gemini_consumed        credits, this billing period
--   last_renewal_at, last_active_at                  2026-05-11T23:02:57.123Z
--   anniversary_day                                  1..31
--   held, hold:<hold_id>                             see include/holds.lua
--   flow, run:<hold_id>, left:<request>              see include/flow.lua
--   extra                                            JSON, never read here
-- Nearly every row is complete, of this century, renews on a day that each month has, and is not due: for that one no
-- function is built, which costs more than what it would compute. Any other is left to include/rollover.lua.
-- Takes: f (what include/read.lua or include/read_with_flow.lua read), now_ms
-- Gives: lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold,
--   renews_ms (nil: the row is left to rollover), created, changes (nil, both for rollover)
local lifetime, lifetime_gemini, monthly, monthly_gemini = f[1] or "", f[2] or "", f[3] or "", f[4] or ""
local began, anniversary_day, held, hold = f[5] or "", f[6] or "", f[7], f[8]
local renews_ms, created, changes
-- One search over all that has to be digits. Five integers of 19 digits have none of more than 15, so none is too large.
local digits = lifetime .. lifetime_gemini .. monthly .. monthly_gemini .. anniversary_day .. began
if #digits <= 43 and #began == 24 and lifetime ~= "" and lifetime_gemini ~= "" and monthly ~= ""
  and monthly_gemini ~= "" and anniversary_day ~= ""
  and string.find(digits, "^%d+%-%d%d%-%d%dT%d%d:%d%d:%d%d%.%d%d%dZ$") then
  local y3, y2, y1, y0, _, m1, m0, _, d1, d0, _, h1, h0, _, n1, n0, _, s1, s0 = string.byte(began, 1, 19)
  local month, day, hour = 10 * m1 + m0 - 528, 10 * d1 + d0 - 528, 10 * h1 + h0 - 528
  anniversary_day = anniversary_day + 0
  if y3 == 50 and y2 == 48 and month > 0 and month <= 12 and day > 0 and day <= 28 and hour <= 23 and n1 <= 53
    and s1 <= 53 and anniversary_day > 0 and anniversary_day <= 28 then
    -- The next month, as months and then days since March 2000: that year puts the leap day last.
    local months = 120 * y1 + 12 * y0 - 6338 + month
    local of_year = months % 12
    local year, days = (months - of_year) / 12, 153 * of_year + 2
    renews_ms = (year * 365 + (year - year % 4) / 4 + (days - days % 5) / 5 + 11016 + anniversary_day) * 86400000
      + hour * 3600000 + (10 * n1 + n0 - 528) * 60000 + (10 * s1 + s0 - 528) * 1000
    if now_ms >= renews_ms then renews_ms = nil end
  end
end
