-- What bounds an install beside its credits: its rate, the requests that its client left, its streams. One field sums
-- them up, and the last three of its numbers are left out while they are 0, as they nearly always are:
--   flow             "1780000000000 1780000000000 2 1780000000000": until when the rate is used up and until when the
--                    free leaves are (epoch ms, GCRA), marks that count, then when to count these again (0: there is
--                    nothing to count)
--   run:<hold_id>    "1780000000000": the mark of a stream that was committed and still runs; until when its lease counts
--   left:<request>   "1780000000000 3": a request that its client left; until when its retries are the same leave, and
--                    how many of those were left
-- Scripts from before this field was there neither read nor write any of it.
-- Takes: row_key, flow, now_ms, bad_row
-- Gives: rate_until (a number), left_until, marks, marks_recount (digits)
local rate_until, left_until, marks, marks_recount = flow and tonumber(flow) or 0, "0", "0", "0"
if flow and rate_until == 0 then
  rate_until, left_until, marks, marks_recount = string.match(flow, "^(%d+) (%d+) (%d+) (%d+)$")
  if not rate_until then
    return bad_row(row_key, "flow", flow, "text like '1780000000000' or '1780000000000 1780000000000 2 1780000000000'")
  end
  rate_until = rate_until + 0
  if left_until + 0 <= now_ms then left_until = "0" end
end
