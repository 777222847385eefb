-- The rate of a tier, by GCRA: a burst at once, and then one request for each part of the time. What is used of it is
-- never more than the burst, so that a row recovers from a clock that was ahead and from a rate that was lower. Pure.
-- Takes: rate_ms, burst_ms, rate_until, now_ms
-- Gives: rate_used (ms, with this request), rate_wait (ms until there is room for it, 0 if there is)
local rate_used, rate_wait = rate_ms, 0
if rate_ms and rate_until > now_ms then
  rate_used = rate_until - now_ms
  if rate_used > burst_ms then rate_used = burst_ms end
  rate_used = rate_used + rate_ms
  if rate_used > burst_ms then rate_wait = rate_used - burst_ms end
end
