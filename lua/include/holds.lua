-- The holds of one row. Each is a field of its own, for people and for its own commit:
--   hold:<hold_id>   "gemini pro monthly 1 1780000000000": backend, tier, counter, credits, when it lapses (epoch ms)
-- and one field sums them up, so that a decision costs the same with one live hold and with many:
--   held             "2 0 0 0 2 1 1780000000000": live holds, lapsed holds, then the credits that the live ones
--                    cover (lifetime, lifetime on gemini, monthly, monthly on gemini), then when to count anew
-- Nothing sweeps: the first script after a hold lapses counts anew, and finds those dead that lapsed a grace time ago.
-- Until then a commit still finds it, and is LATE.
-- Takes: row_key, hold_field, hold, held, now_ms, bad_row
-- Gives: held_backend, held_tier, held_counter, held_cost, lapses_ms (the parts of `hold`, if there is that hold),
--   others (what `held` says without that hold, as its seven numbers; nil without others), dead (fields to drop, or nil)
local held_backend, held_tier, held_counter, held_cost, lapses_ms, others, dead
if hold then
  held_backend, held_tier, held_counter, held_cost, lapses_ms =
    string.match(hold, "^(%l+) (%S+) (%l+) (%d+) (%d+)$")
  if held_counter ~= "monthly" and held_counter ~= "lifetime"
    or held_backend ~= "gemini" and held_backend ~= "hardware" then
    return bad_row(row_key, hold_field, hold, "text like 'gemini pro monthly 1 1780000000000'")
  end
  held_cost, lapses_ms = held_cost + 0, lapses_ms + 0
end

local alone = hold and held and string.sub(held, 1, 4) == "1 0 "
if (hold or held) and not alone then
  others = { string.match(held or "", "^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$") }
  if not others[7] or others[7] + 0 <= now_ms or hold and others[2] ~= "0" then
    -- Nobody wrote it, or a hold lapsed since. Or the clock stepped back: then this hold may be live again that is
    -- among the lapsed ones there.
    others, dead = { 0, 0, 0, 0, 0, 0, math.huge }, {}
    local fields = redis.call("HGETALL", row_key)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 5) == "hold:" and fields[i] ~= hold_field then
        local backend, counter, cost, until_ms = string.match(fields[i + 1], "^(%l+) %S+ (%l+) (%d+) (%d+)$")
        if counter ~= "monthly" and counter ~= "lifetime" or backend ~= "gemini" and backend ~= "hardware" then
          return bad_row(row_key, fields[i], fields[i + 1], "text like 'gemini pro monthly 1 1780000000000'")
        end
        until_ms = until_ms + 0
        if until_ms > now_ms then
          local column = counter == "monthly" and 5 or 3
          others[1], others[column] = others[1] + 1, others[column] + cost
          if backend == "gemini" then others[column + 1] = others[column + 1] + cost end
        elseif until_ms + 3600000 > now_ms then
          others[2], until_ms = others[2] + 1, until_ms + 3600000
        elseif #dead < 1000 then -- `unpack` can pass near 8,000 on in one HDEL: the next script goes on with the rest
          dead[#dead + 1], until_ms = fields[i], math.huge
        else
          others[2], until_ms = others[2] + 1, 0
        end
        others[7] = math.min(others[7], until_ms)
      end
    end
    if others[1] + others[2] == 0 then others = nil end
    if #dead == 0 then dead = nil end
  elseif hold then
    local column = held_counter == "monthly" and 5 or 3
    others[1], others[column] = others[1] - 1, others[column] - held_cost
    if held_backend == "gemini" then others[column + 1] = others[column + 1] - held_cost end
  end
end
