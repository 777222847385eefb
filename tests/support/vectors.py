"""The vector files: what the old ledger answered, as JSON in `tests/vectors/`, and what that is in our rows."""

from typing import Any

Entry = dict[str, Any]  # one entry of a file, as JSON has it
Vectors = dict[str, list[Entry]]  # the entries by the file's name: renewals, ledgers, migrations
COUNTERS = ("lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed", "monthly_gemini_consumed")


def as_ours(row: Entry) -> Entry:
    """Return one of the old ledger's rows as ours has it: counters never set are 0, the anniversary day is stored.

    A day that the old ledger ignores (it is no day of a month) is inferred like one that is missing.
    """
    day = row.get("anniversary_day")
    inferred = day if day in range(1, 32) else int(row["last_renewal_at"][8:10])
    return dict.fromkeys(COUNTERS, 0) | row | {"anniversary_day": inferred}
