-- Civil dates and billing periods, in UTC. Pure: numbers and text in, numbers and text out.
-- A month is counted as 12 * year + (0 for January … 11 for December), a day as days since 1970-01-01.
local calendar = {}

-- The first day of a month; a month's length is the next one's first day less its own. The year is taken to begin
-- in March, which puts the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
local function first_day(month)
  local march = month - 2
  local of_year = march % 12
  local year = (march - of_year) / 12
  local days = 153 * of_year + 2
  return year * 365 + (year - year % 4) / 4 - (year - year % 100) / 100 + (year - year % 400) / 400
    + (days - days % 5) / 5 - 719468
end

-- The month that holds a day. A mean month puts the guess at most one month off.
local function month_of(day)
  local guess = math.floor(day / 30.436875) + 23640
  if first_day(guess) > day then return guess - 1 end
  if first_day(guess + 1) <= day then return guess + 1 end
  return guess
end

-- Epoch milliseconds as JavaScript's toISOString prints them.
function calendar.iso(ms)
  local rest = ms % 86400000
  local day = (ms - rest) / 86400000
  local month, second = month_of(day), (rest - rest % 1000) / 1000
  return string.format("%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", math.floor(month / 12), month % 12 + 1,
    day - first_day(month) + 1, math.floor(second / 3600), math.floor(second / 60) % 60, second % 60, rest % 1000)
end

-- The billing period that holds now_ms, for one that began at `iso`: when it renews, where it began if that is a
-- later period than the one given, and the day of the month in `iso`. nil when `iso` is not such a time. A renewal
-- falls on the anniversary day (without one, on the day of `iso`) or on the last day of a shorter month.
-- Month arithmetic, not a loop: one step over any number of missed months.
function calendar.period(iso, anniversary_day, now_ms)
  local year, month, day, hour, minute, second =
    string.match(iso, "^(%d%d%d%d)%-(%d%d)%-(%d%d)T(%d%d):(%d%d):(%d%d)%.%d%d%dZ$")
  if not year or month < "01" or month > "12" or hour > "23" or minute > "59" or second > "59" then return nil end
  month, day, second = year * 12 + month - 1, tonumber(day), hour * 3600 + minute * 60 + second
  local first, after = first_day(month + 1), first_day(month + 2)
  if day < 1 or day > first - first_day(month) then return nil end
  anniversary_day = anniversary_day or day
  local renews_ms = (first + math.min(anniversary_day, after - first) - 1) * 86400000 + second * 1000
  if now_ms < renews_ms then return renews_ms, nil, day end

  local function renewal_ms(index)
    local start = first_day(index)
    return (start + math.min(anniversary_day, first_day(index + 1) - start) - 1) * 86400000 + second * 1000
  end
  local latest = month_of(math.floor(now_ms / 86400000))
  if renewal_ms(latest) > now_ms then latest = latest - 1 end
  return renewal_ms(latest + 1), renewal_ms(latest), day
end
