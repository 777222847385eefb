#!lua
-- Stores one row as it is given, for import, restore and admin. Live holds are left alone. One step, so that a row
-- that is being debited is either kept or replaced whole.
-- Reply: {status}   status: CREATED | SAME (it already read so) | REPLACED | MERGED | EXISTS (mode create: left alone)
local row_key = KEYS[1]         -- hash; its fields are listed in include/row.lua
local mode    = ARGV[1]         -- create | replace | merge
local dry_run = ARGV[2] == "1"  -- 1 | 0: with 1 the reply tells what would be done, and nothing is written
local given   = { select(3, unpack(ARGV)) }  -- the values of the fields, in this order:
-- Each has a name and a kind. larger_wins: of two in a merge. optional: "" is not stored, and neither is a count of 0.
local fields = {
  { "tier_snapshot", "tier" },                                  -- string, 1..20 bytes
  { "lifetime_consumed", "count", larger_wins = true },         -- int >= 0, credits
  { "lifetime_gemini_consumed", "count", larger_wins = true },  -- int >= 0, credits
  { "last_renewal_at", "time" },                                -- time, as 2026-05-11T23:02:57.123Z
  { "anniversary_day", "day" },                                 -- int 1..31
  { "monthly_consumed", "count" },                              -- int >= 0, credits
  { "monthly_gemini_consumed", "count" },                       -- int >= 0, credits
  { "last_active_at", "time" },                                 -- time, as 2026-05-11T23:02:57.123Z
  { "extra", "others", optional = true },                       -- JSON object of the other members; "" for none
}
--@include calendar -> civil, renewal_ms
--@include bad_row -> bad_row

local most = 9007199254740991
local function is_int(value, least, largest) return value >= least and value <= largest and value % 1 == 0 end
local is_valid = {
  tier = function(value) return value ~= "" and #value <= 20 end,
  count = function(value) return is_int(value, 0, most) end,
  day = function(value) return is_int(value, 1, 31) end,
  time = civil,
  others = function() return true end,
}
local names, new, usable = {}, {}, #given == #fields and (mode == "create" or mode == "replace" or mode == "merge")
for i, field in ipairs(fields) do
  local name, kind, value = field[1], field[2], given[i] or ""
  if kind == "count" or kind == "day" then value = tonumber(value == "" and field.optional and "0" or value) end
  usable = usable and value and is_valid[kind](value)
  names[i], new[name] = name, value
end
if not usable then
  return redis.error_reply("BADARG put_row wants a mode, dry_run, and the fields: a tier, two times, a day, counters …")
end
local old, stored = {}, redis.call("HMGET", row_key, unpack(names))
for i, name in ipairs(names) do old[name] = stored[i] or nil end
local status = mode == "merge" and "MERGED" or "REPLACED"
if redis.call("EXISTS", row_key) == 0 then
  status = "CREATED"
elseif mode == "merge" then
  -- The larger counters win. Those of a month compare only within one billing period: a later period wins whole. Of
  -- two days for one period the stored one wins: the other may be inferred from a clamped date.
  local hold_field, now_ms = "hold:", 0
--@include read -> f
--@include row -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, held, hold, renews_ms,
--  created, changes
  if not renews_ms then
--@include now_iso -> now_iso
--@include rollover -> lifetime, lifetime_gemini, monthly, monthly_gemini, began, anniversary_day, renews_ms, created,
--  changes
  end
  for _, field in ipairs(fields) do
    local name = field[1]
    if field.larger_wins and old[name] then
      if not (string.find(old[name], "^%d+$") and is_valid.count(tonumber(old[name]))) then
        return bad_row(row_key, name, old[name], "an integer from 0 to 2^53 - 1")
      end
      new[name] = math.max(new[name], tonumber(old[name]))
    end
  end
  if began == new.last_renewal_at then
    new.anniversary_day = tonumber(old.anniversary_day) or new.anniversary_day
    new.monthly_consumed = math.max(new.monthly_consumed, monthly)
    new.monthly_gemini_consumed = math.max(new.monthly_gemini_consumed, monthly_gemini)
  elseif began > new.last_renewal_at then
    new.last_renewal_at, new.anniversary_day = began, anniversary_day
    new.monthly_consumed, new.monthly_gemini_consumed = tonumber(monthly), tonumber(monthly_gemini)
  end
  if civil(old.last_active_at or "") and old.last_active_at > new.last_active_at then
    new.tier_snapshot, new.last_active_at = old.tier_snapshot or "core", old.last_active_at
  end
  if new.extra == "" then new.extra = old.extra or "" end
end

local set, dropped, same = {}, {}, true
for _, field in ipairs(fields) do
  local name = field[1]
  local value = new[name]
  if type(value) == "number" then value = field.optional and value == 0 and "" or string.format("%.0f", value) end
  if value ~= (old[name] or "") then same = false end
  if value ~= "" or not field.optional then
    set[#set + 1], set[#set + 2] = name, value
  elseif old[name] then
    dropped[#dropped + 1] = name
  end
end
if status ~= "CREATED" and (same or mode == "create") then return { same and "SAME" or "EXISTS" } end
if dry_run then return { status } end
if dropped[1] then redis.call("HDEL", row_key, unpack(dropped)) end
redis.call("HSET", row_key, unpack(set))
return { status }
