"""`limiter doctor`: what is wrong with this Redis and these settings, and what to do."""

import logging
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from limiter.cli._console import OUT, ConfigOption, JsonOption, RedisOption, print_json, run, settings_of
from limiter.doctor import Finding, acl_line_for, examine

_STYLE = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(redis: RedisOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Say what is wrong with this Redis and these settings, and what to do. Prints the ACL line to copy, too.

    Looks at Redis, its users' rights, its latency and clock, at the backends, the licences' keys and the ledger's
    folder. The exit code is 1 when there is a problem; a warning is none.

    Example: limiter doctor --redis redis://localhost:6379/0
    """
    settings = settings_of(config, redis=redis)
    logging.getLogger("limiter").setLevel(logging.CRITICAL)  # what it has to say is in the table
    findings = run(examine(settings))
    line = acl_line_for(settings)
    if json:
        print_json({"findings": [asdict(finding) for finding in findings], "acl": line})
    else:
        _print(findings, line)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding], line: str | None) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.level, style=_STYLE[finding.level]), finding.subject, _sentence(finding))
    OUT.print(table)
    if line is not None:
        OUT.print("\nA Redis user that may do this and no more, with a password of yours in place of PASSWORD:")
        OUT.print(f"  {line}", markup=False, soft_wrap=True)


def _sentence(finding: Finding) -> Text:
    return Text(f"{finding.text}: {finding.advice}" if finding.advice else finding.text)
