"""`limiter verify`: checks that a credits.json is complete and undamaged."""

from pathlib import Path
from typing import Annotated

import typer

from limiter.cli._console import ERRORS, OUT, JsonOption, print_json
from limiter.ledger.verify import VerifyReport
from limiter.ledger.verify import verify as verify_file


def verify(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A credits.json, written by limiter or by the old ledger.")
    ],
    json: JsonOption = False,
) -> None:
    """Check a credits.json: its checksum, its number of rows, and each row. The exit code is 1 if there is a fault.

    A file of the old ledger has no checksum: only its format and its rows are checked.

    Example: limiter verify data/credits.json
    """
    report = verify_file(file)
    if json:
        print_json(_document(report))
    else:
        print_verified(report)
    if not report.is_good:
        raise typer.Exit(1)


def print_verified(report: VerifyReport) -> None:
    """Print a report: the facts on stdout, the faults on stderr."""
    OUT.print(f"{report.path}: {report.rows:,} rows, {report.size_bytes:,} bytes", markup=False, soft_wrap=True)
    if report.trailer is None:
        OUT.print("not dumped by limiter: it has no checksum")
    else:
        trailer = report.trailer
        OUT.print(
            f"dumped at {trailer.time}, epoch {trailer.epoch}, number {trailer.sequence}, {trailer.checksum}",
            soft_wrap=True,
        )
        if trailer.broken:
            OUT.print(f"{trailer.broken:,} rows of Redis were left out of it, because they could not be read")
    for fault in report.faults:
        ERRORS.print(f"wrong: {fault}", markup=False, soft_wrap=True)
    if report.is_good:
        OUT.print("good")
    else:
        ERRORS.print(f"limiter: {report.path} has {report.fault_count:,} faults", markup=False, soft_wrap=True)


def _document(report: VerifyReport) -> dict[str, object]:
    trailer = report.trailer
    return {
        "file": str(report.path),
        "good": report.is_good,
        "rows": report.rows,
        "size_bytes": report.size_bytes,
        "fault_count": report.fault_count,
        "faults": list(report.faults),
        "meta": None
        if trailer is None
        else {
            "epoch": trailer.epoch,
            "sequence": trailer.sequence,
            "time": trailer.time,
            "rows": trailer.rows,
            "broken": trailer.broken,
            "checksum": trailer.checksum,
        },
    }
