"""The vector files: what the old ledger answered, held as JSON in `tests/vectors/`."""

from typing import Any

Entry = dict[str, Any]  # one entry of a file, as JSON has it
Vectors = dict[str, list[Entry]]  # the entries by the file's name: renewals, ledgers, migrations
