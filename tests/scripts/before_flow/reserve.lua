#!lua
-- Plans a request and holds its credits: roll over, sum the live holds, decide, hold. One step, so that requests on any
-- number of nodes at once are never promised the same credit.
-- Reply: {status, reason, backend, remaining, gemini_remaining, held, renews_ms, last_renewal_at, now_ms}
--   status: ALLOWED | REPLAY (this hold is live already: the same answer) | DENIED | UNKNOWN_INSTALL
--   reason, of DENIED: out_of_credits | gemini_cap_exceeded_no_hardware | credits_in_flight | too_many_in_flight
local KEYS, ARGV = KEYS, ARGV -- to look up a global costs as much as three sums
local row_key       = KEYS[1]            -- hash; its fields are listed in include/row.lua
local hold_id       = ARGV[1]            -- string, 1..48 bytes
local tier_name     = ARGV[2]            -- string, 1..20 bytes
local counter       = ARGV[3]            -- lifetime | monthly: what the tier's quota counts
local quota         = ARGV[4] ~= "" and ARGV[4] + 0  -- int >= 0, credits; "" for none
local gemini_cap    = ARGV[5] ~= "" and ARGV[5] + 0  -- int >= 0, credits; "" for none
local max_in_flight = ARGV[6] ~= "" and ARGV[6] + 0  -- int > 0, live holds; "" for no limit
local has_hardware  = ARGV[7] == "1"     -- 1 | 0: whether hardware can serve this request
local has_gemini    = ARGV[8] == "1"     -- 1 | 0: whether Gemini can; one of the two
local cost_arg      = ARGV[9]            -- int > 0, credits
local hold_ms       = ARGV[10] + 0       -- int > 0, milliseconds until the hold expires
local may_create    = ARGV[11] == "1"    -- 1 | 0: whether an unknown install gets a row
local now_arg       = ARGV[12]           -- int, epoch milliseconds; "" or none for the server's time
local hold_field, cost = "hold:" .. hold_id, cost_arg + 0
if hold_id == "" or cost <= 0 or cost % 1 ~= 0 or hold_ms <= 0 then
  return redis.error_reply("BADARG reserve wants a hold id, and a whole cost and a hold time above 0")
end
-- The time that a script uses: the argument's, or the server's own when it is empty or left out, so that no relay's
-- clock matters.
-- Takes: now_arg
-- Gives: now_ms
local now_ms
if not now_arg or now_arg == "" then
  local time = redis.call("TIME")
  local us = time[2] + 0
  now_ms = time[1] * 1000 + (us - us % 1000) / 1000
else
  now_ms = tonumber(now_arg)
end
-- The error for an invalid row, with the beginning of the field that is wrong. It is returned before any write.
-- Takes: nothing
-- Gives: bad_row
local function bad_row(key, field, value, want)
  local shown = string.gsub(string.sub(value, 1, 80), "%c", " ")
  return redis.error_reply("BADROW " .. key .. " field " .. field .. " is '" .. shown .. "', want " .. want)
end
-- One install's row, read at once but for what few decisions want. Its fields:
--   tier_snapshot                                    tier of the last committed request: see include/charge.lua
--   lifetime_consumed, lifetime_gemini_consumed      credits, ever
--   monthly_consumed, monthly_gemini_consumed        credits, this billing period
--   last_renewal_at, last_active_at                  2026-05-11T23:02:57.123Z
--   anniversary_day                                  1..31
--   held, hold:<hold_id>                             see include/holds.lua
--   extra                                            JSON, never read here
-- Nearly every row is complete, of this century, renews on a day that each month has, and is not due: for that one no
-- function is built, which costs more than what it would compute. Any other is left to include/rollover.lua.
-- Takes: row_key, hold_field, now_ms
-- Gives: f, lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold,
--   renews_ms (nil: the row is left to rollover), created, changes (nil, both for rollover)
local f = redis.call("HMGET", row_key, "lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed",
  "monthly_gemini_consumed", "last_renewal_at", "anniversary_day", "held", hold_field)
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
if not renews_ms then
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
end
-- The holds of one row. Each is a field of its own, for people and for its own commit:
--   hold:<hold_id>   "gemini pro monthly 1 1780000000000": backend, tier, counter, credits, when it expires (epoch ms)
-- and one field sums them up, so that a decision costs the same with one live hold and with many:
--   held             "2 0 0 0 2 1 1780000000000": live holds, expired holds, then the credits that the live ones
--                    cover (lifetime, lifetime on gemini, monthly, monthly on gemini), then when to count again
-- Nothing sweeps: the first script after a hold expires counts again, and drops those that expired a grace time ago.
-- Until then a commit still finds it, and is LATE.
-- Takes: row_key, hold_field, hold, held, now_ms, bad_row
-- Gives: held_backend, held_tier, held_counter, held_cost, expires_ms (the parts of `hold`, if there is that hold),
--   live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms (what `held` says
--   of the other holds, numbers or digits; all but `live` without a meaning when that is nil: there are no others),
--   dead (fields to drop, or nil)
local held_backend, held_tier, held_counter, held_cost, expires_ms
local live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms, dead
if hold then
  held_backend, held_tier, held_counter, held_cost, expires_ms =
    string.match(hold, "^(%l+) (%S+) (%l+) (%d+) (%d+)$")
  if held_counter ~= "monthly" and held_counter ~= "lifetime"
    or held_backend ~= "gemini" and held_backend ~= "hardware" then
    return bad_row(row_key, hold_field, hold, "text like 'gemini pro monthly 1 1780000000000'")
  end
  held_cost, expires_ms = held_cost + 0, expires_ms + 0
end

local alone = hold and held and string.sub(held, 1, 4) == "1 0 "
if (hold or held) and not alone then
  live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms =
    string.match(held or "", "^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$")
  if not live or recount_ms + 0 <= now_ms or hold and expired ~= "0" then
    -- It was never written, or a hold expired since. Or the clock stepped back: then this hold may be live again that is
    -- among the expired ones there.
    live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini = 0, 0, 0, 0, 0, 0
    recount_ms, dead = math.huge, {}
    local fields = redis.call("HGETALL", row_key)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 5) == "hold:" and fields[i] ~= hold_field then
        local its_backend, its_counter, its_cost, until_ms = string.match(fields[i + 1], "^(%l+) %S+ (%l+) (%d+) (%d+)$")
        if its_counter ~= "monthly" and its_counter ~= "lifetime"
          or its_backend ~= "gemini" and its_backend ~= "hardware" then
          return bad_row(row_key, fields[i], fields[i + 1], "text like 'gemini pro monthly 1 1780000000000'")
        end
        until_ms = until_ms + 0
        if until_ms > now_ms then
          live = live + 1
          local on_gemini = its_backend == "gemini" and its_cost or 0
          if its_counter == "monthly" then
            held_monthly, held_monthly_gemini = held_monthly + its_cost, held_monthly_gemini + on_gemini
          else
            held_lifetime, held_lifetime_gemini = held_lifetime + its_cost, held_lifetime_gemini + on_gemini
          end
        elseif until_ms + 3600000 > now_ms then
          expired, until_ms = expired + 1, until_ms + 3600000
        elseif #dead < 1000 then -- `unpack` can pass near 8,000 on in one HDEL: the next script goes on with the rest
          dead[#dead + 1], until_ms = fields[i], math.huge
        else
          expired, until_ms = expired + 1, 0
        end
        recount_ms = math.min(recount_ms, until_ms)
      end
    end
    if live + expired == 0 then live = nil end
    if #dead == 0 then dead = nil end
  elseif hold then
    live = live - 1
    local on_gemini = held_backend == "gemini" and held_cost or 0
    if held_counter == "monthly" then
      held_monthly, held_monthly_gemini = held_monthly - held_cost, held_monthly_gemini - on_gemini
    else
      held_lifetime, held_lifetime_gemini = held_lifetime - held_cost, held_lifetime_gemini - on_gemini
    end
  end
end
-- The two counters of a row that a tier's quota counts, and the names of their fields.
-- Takes: counter, lifetime, lifetime_gemini, monthly, monthly_gemini
-- Gives: consumed, gemini_consumed, consumed_field, gemini_consumed_field
local consumed, gemini_consumed, consumed_field, gemini_consumed_field
if counter == "monthly" then
  consumed, gemini_consumed = monthly + 0, monthly_gemini + 0
  consumed_field, gemini_consumed_field = "monthly_consumed", "monthly_gemini_consumed"
else
  consumed, gemini_consumed = lifetime + 0, lifetime_gemini + 0
  consumed_field, gemini_consumed_field = "lifetime_consumed", "lifetime_gemini_consumed"
end
-- The credits that live holds cover, of the counter that a tier's quota counts.
-- Takes: counter, live, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini
-- Gives: held_credits, held_on_gemini
local held_credits, held_on_gemini = 0, 0
if live and counter == "monthly" then
  held_credits, held_on_gemini = held_monthly + 0, held_monthly_gemini + 0
elseif live then
  held_credits, held_on_gemini = held_lifetime + 0, held_lifetime_gemini + 0
end
-- What a tier allows. Pure. A refusal that lasts comes before one that passes. A nil quota, cap or limit means none. A
-- backend that cannot serve the request is left out here, and not after: its cap would be held by what it never serves.
-- Takes: consumed, gemini_consumed, held_credits, held_on_gemini, live, quota, gemini_cap, max_in_flight, cost,
--   has_hardware, has_gemini
-- Gives: backend (or "" and the reason), reason
local backend, reason = "", ""
local wanted, wanted_on_gemini = consumed + cost, gemini_consumed + cost
if quota and wanted > quota then
  reason = "out_of_credits"
elseif gemini_cap and wanted_on_gemini > gemini_cap and not has_hardware then
  reason = "gemini_cap_exceeded_no_hardware"
elseif max_in_flight and live and live + 0 >= max_in_flight then
  reason = "too_many_in_flight"
elseif quota and wanted + held_credits > quota then
  reason = "credits_in_flight"
elseif has_gemini and (not gemini_cap or wanted_on_gemini + held_on_gemini <= gemini_cap) then
  backend = "gemini"
elseif has_hardware then
  backend = "hardware"
else
  reason = "credits_in_flight"
end

local status = backend ~= "" and "ALLOWED" or "DENIED"
if created and not may_create then
  status, backend, reason, changes = "UNKNOWN_INSTALL", "", "", nil
elseif expires_ms and expires_ms > now_ms then
  status, backend, reason = "REPLAY", held_backend, ""
  if held_counter == counter then held_credits = held_credits + held_cost end
elseif backend ~= "" then
-- A hold to be placed beside the others: its text, and what `held` says with it. Text is joined where it can be: to
-- print a number takes longer than the whole plan.
-- Takes: backend, tier_name, counter, cost, cost_arg, hold_ms, now_ms, held_credits, held_on_gemini, live,
--   recount_ms
-- Gives: hold_text, held_credits, live, expired, held_lifetime, held_lifetime_gemini, held_monthly,
--   held_monthly_gemini, recount_ms (all with this hold)
held_credits = held_credits + cost
local until_ms = string.format("%d", now_ms + hold_ms)
local on_gemini = backend == "gemini" and cost_arg or "0"
local hold_text = backend .. " " .. tier_name .. " " .. counter .. " " .. cost_arg .. " " .. until_ms
if live then
  live = live + 1
  if recount_ms + 0 > now_ms + hold_ms then recount_ms = until_ms end
  if counter == "monthly" then
    held_monthly, held_monthly_gemini = held_credits, held_on_gemini + on_gemini
  else
    held_lifetime, held_lifetime_gemini = held_credits, held_on_gemini + on_gemini
  end
else
  live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini = "1", "0", "0", "0", "0", "0"
  recount_ms = until_ms
  if counter == "monthly" then
    held_monthly, held_monthly_gemini = cost_arg, on_gemini
  else
    held_lifetime, held_lifetime_gemini = cost_arg, on_gemini
  end
end
-- The field `held` of a row with these holds: see include/holds.lua.
-- Takes: live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms
-- Gives: held_text
local held_text = live .. " " .. expired .. " " .. held_lifetime .. " " .. held_lifetime_gemini .. " " .. held_monthly
  .. " " .. held_monthly_gemini .. " " .. recount_ms
  if dead then redis.call("HDEL", row_key, unpack(dead)) end
  if changes then
    redis.call("HSET", row_key, hold_field, hold_text, "held", held_text, unpack(changes))
    changes = nil
  else
    redis.call("HSET", row_key, hold_field, hold_text, "held", held_text)
  end
end
if changes then redis.call("HSET", row_key, unpack(changes)) end
-- The reply of every script that plans: a flat array, false where there is no quota or no cap.
-- Takes: status, reason, backend, quota, gemini_cap, consumed, gemini_consumed, held_credits, renews_ms, began, now_ms
-- Gives: nothing (it returns)
local remaining, gemini_remaining = quota and quota - consumed, gemini_cap and gemini_cap - gemini_consumed
if remaining and remaining < 0 then remaining = 0 end
if gemini_remaining and gemini_remaining < 0 then gemini_remaining = 0 end
return { status, reason, backend, remaining, gemini_remaining, held_credits, renews_ms, began, now_ms }
