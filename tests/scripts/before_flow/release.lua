#!lua flags=allow-oom
-- Releases a hold: its credits are free again. One step, so that a retry finds no hold and changes nothing.
-- Reply: {status}   status: RELEASED | GONE (no such hold: committed or released before)
local row_key = KEYS[1]  -- hash; its fields are listed in include/row.lua
local hold_id = ARGV[1]  -- string, 1..48 bytes
local now_arg = ARGV[2]  -- int, epoch milliseconds; "" for the server's time
if hold_id == "" then return redis.error_reply("BADARG release wants a hold id") end
local hold_field = "hold:" .. hold_id
local f = redis.call("HMGET", row_key, "held", hold_field)
local held, hold = f[1], f[2]
if not hold then return { "GONE" } end
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

if dead then redis.call("HDEL", row_key, unpack(dead)) end
if live then
-- The field `held` of a row with these holds: see include/holds.lua.
-- Takes: live, expired, held_lifetime, held_lifetime_gemini, held_monthly, held_monthly_gemini, recount_ms
-- Gives: held_text
local held_text = live .. " " .. expired .. " " .. held_lifetime .. " " .. held_lifetime_gemini .. " " .. held_monthly
  .. " " .. held_monthly_gemini .. " " .. recount_ms
  redis.call("HDEL", row_key, hold_field)
  redis.call("HSET", row_key, "held", held_text)
else
  redis.call("HDEL", row_key, hold_field, "held")
end
return { "RELEASED" }
