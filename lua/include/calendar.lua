-- Civil dates and renewals, in UTC. Pure.
-- A month is counted as 12 * year + (0 for January … 11 for December), a day as days since 1970-01-01.
-- Takes: nothing
-- Gives: civil, renewal_ms

-- The first day of a month; a month's length is the next one's first day less its own. The year is taken to begin
-- in March, which puts the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
local function first_day(month)
  local of_year = (month - 2) % 12
  local year, days = (month - 2 - of_year) / 12, 153 * of_year + 2
  return year * 365 + (year - year % 4) / 4 - (year - year % 100) / 100 + (year - year % 400) / 400
    + (days - days % 5) / 5 - 719468
end

-- The renewal of a month: on the wanted day, or on the last day of a shorter month; and that day.
local function renewal_ms(month, wanted_day, ms_of_day)
  local first = first_day(month)
  local day = math.min(wanted_day, first_day(month + 1) - first)
  return (first + day - 1) * 86400000 + ms_of_day, day
end

-- The month, the day of the month and the milliseconds of that day, without those below a second, of a time as
-- 2026-05-11T23:02:57.123Z; nil when it is none.
local function civil(iso)
  local y, m, d, h, n, s = string.match(iso, "^(%d%d%d%d)%-(%d%d)%-(%d%d)T(%d%d):(%d%d):(%d%d)%.%d%d%dZ$")
  if not y or m < "01" or m > "12" or d < "01" or h > "23" or n > "59" or s > "59" then return nil end
  local month, day = y * 12 + m - 1, tonumber(d)
  if day > first_day(month + 1) - first_day(month) then return nil end
  return month, day, h * 3600000 + n * 60000 + s * 1000
end
