"""What the old ledger made of rows in older shapes when it loaded them, and what the import makes of them."""

from limiter._util.timestamps import ms_from_iso
from limiter.ledger.row_codec import row_from_member
from tests.support.vectors import Vectors, as_ours


def test_migration_when_an_old_row_is_read_then_it_is_the_row_that_the_old_ledger_loaded(vectors: Vectors) -> None:
    read = 0
    for entry in vectors["migrations"] + vectors["ledgers"]:
        start_ms = ms_from_iso(entry["start"])
        rows = {
            install_id: row_from_member(install_id, member, now_ms=start_ms).as_dict()
            for install_id, member in entry["ledger"]["rows"].items()
        }
        assert rows == {install_id: as_ours(loaded) for install_id, loaded in entry["loaded"].items()}
        read += 1
    assert read == len(vectors["migrations"]) + len(vectors["ledgers"]) > 0
