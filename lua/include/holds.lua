-- The holds of one row. Each is a field of its own, for people and for its own commit:
--   hold:<hold_id>   "gemini pro monthly 1 1780000000000": backend, tier, counter, credits, when it lapses (epoch ms)
-- and one field sums them up, so that a decision costs the same with one live hold and with many:
--   held             "2 0 0 0 2 1 1780000000000": live holds, lapsed holds, then the credits that the live ones
--                    cover (lifetime, lifetime on gemini, monthly, monthly on gemini), then when to count anew
-- Nothing sweeps: the first script after a hold lapses counts anew, and finds those that lapsed a grace time ago dead.
local holds = {}

-- A hold's parts, or nil when its text is broken.
function holds.parse(text)
  local backend, tier_name, counter, cost, lapses_ms = string.match(text, "^(%l+) (%S+) (%l+) (%d+) (%d+)$")
  if counter ~= "lifetime" and counter ~= "monthly" or backend ~= "gemini" and backend ~= "hardware" then return nil end
  return backend, tier_name, counter, tonumber(cost), tonumber(lapses_ms)
end

-- Adds a hold to the sums, or with sign -1 takes it out: a live one, or one that lapsed less than a grace time ago,
-- in which a commit still finds it and is LATE. false for one that is dead.
function holds.add(h, sign, backend, counter, cost, lapses_ms, now_ms)
  if lapses_ms > now_ms then
    h.live, h[counter] = h.live + sign, h[counter] + sign * cost
    if backend == "gemini" then h[counter .. "_gemini"] = h[counter .. "_gemini"] + sign * cost end
  else
    lapses_ms = lapses_ms + 3600000
    if lapses_ms <= now_ms then return false end
    h.lapsed = h.lapsed + sign
  end
  if sign > 0 and lapses_ms < h.count_ms then h.count_ms = lapses_ms end
  return true
end

-- The sums at now_ms: from the row's `held` while that holds good, else counted. `dead` lists the fields of dead
-- holds, no more than `unpack` can pass on in one HDEL (its limit is near 8,000): count_ms 0 makes the next script
-- count anew and go on with the rest. Second result: an error reply.
function holds.read(key, r, now_ms)
  local h = { live = 0, lapsed = 0, lifetime = 0, lifetime_gemini = 0, monthly = 0, monthly_gemini = 0,
    count_ms = math.huge, dead = false }
  if not r.held and not r.hold then return h end
  local live, lapsed, lifetime, lifetime_gemini, monthly, monthly_gemini, count_ms =
    string.match(r.held or "", "^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$")
  -- The clock may have stepped back: a hold that is settled may be live again that `held` has among the lapsed ones.
  if live and tonumber(count_ms) > now_ms and (lapsed == "0" or not r.hold) then
    h.live, h.lapsed, h.lifetime = tonumber(live), tonumber(lapsed), tonumber(lifetime)
    h.lifetime_gemini, h.monthly, h.monthly_gemini = tonumber(lifetime_gemini), tonumber(monthly), tonumber(monthly_gemini)
    h.count_ms = tonumber(count_ms)
    return h
  end
  local f = redis.call("HGETALL", key)
  h.dead = {}
  for i = 1, #f, 2 do
    if string.sub(f[i], 1, 5) == "hold:" then
      local backend, _, counter, cost, lapses_ms = holds.parse(f[i + 1])
      if not backend then
        return nil, row.broken(key, f[i], f[i + 1], "text like 'gemini pro monthly 1 1780000000000'")
      end
      if not holds.add(h, 1, backend, counter, cost, lapses_ms, now_ms) then
        if #h.dead < 1000 then h.dead[#h.dead + 1] = f[i] else h.lapsed, h.count_ms = h.lapsed + 1, 0 end
      end
    end
  end
  return h
end

-- The text of `held`; nil without any hold.
function holds.text(h)
  if h.live == 0 and h.lapsed == 0 then return nil end
  return string.format("%d %d %d %d %d %d %d", h.live, h.lapsed, h.lifetime, h.lifetime_gemini, h.monthly,
    h.monthly_gemini, h.count_ms)
end
