-- Now as JavaScript's toISOString prints them. Pure. Centuries, then years of March to February, then
-- months come out of the day as the remainders of three divisions (Neri and Schneider, "Euclidean affine functions").
-- Digit by digit into string.char takes a third of the time of string.format.
-- Takes: now_ms
-- Gives: now_iso
local now_iso
do
  local ms_of_day = now_ms % 86400000
  local quarters = (now_ms - ms_of_day) / 21600000 + 2877875 -- four times the days since 0000-03-01, and 3
  local rest = quarters % 146097
  local century = (quarters - rest) / 146097
  quarters = rest - rest % 4 + 3
  rest = quarters % 1461
  local year = (quarters - rest) / 1461
  local scaled = 2141 * (rest - rest % 4) / 4 + 197913
  rest = scaled % 65536
  local month, day = (scaled - rest) / 65536, (rest - rest % 2141) / 2141 + 1
  if month > 12 then
    month, year = month - 12, year + 1
    if year == 100 then century, year = century + 1, 0 end
  end
  local thousandth = ms_of_day % 1000
  local second = (ms_of_day - thousandth) / 1000
  local minute = second % 3600
  local hour = (second - minute) / 3600
  second = minute % 60
  minute = (minute - second) / 60
  local c0, y0, m0, d0 = century % 10, year % 10, month % 10, day % 10
  local h0, n0, s0, t0, t1 = hour % 10, minute % 10, second % 10, thousandth % 10, thousandth % 100
  now_iso = string.char(48 + (century - c0) / 10, 48 + c0, 48 + (year - y0) / 10, 48 + y0, 45,
    48 + (month - m0) / 10, 48 + m0, 45, 48 + (day - d0) / 10, 48 + d0, 84, 48 + (hour - h0) / 10, 48 + h0, 58,
    48 + (minute - n0) / 10, 48 + n0, 58, 48 + (second - s0) / 10, 48 + s0, 46,
    48 + (thousandth - t1) / 100, 48 + (t1 - t0) / 10, 48 + t0, 90)
end
