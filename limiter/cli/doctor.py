"""`limiter doctor`: checks of Redis and the settings, with advice on each problem."""

import logging
from dataclasses import asdict

import typer
from rich.table import Table
from rich.text import Text

from limiter.cli._console import OUT, ConfigOption, JsonOption, RedisOption, print_json, read_settings, run
from limiter.doctor import acl_line_for, examine
from limiter.redis.server_checks import Finding

_STYLE = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(redis: RedisOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Check Redis and the settings, and print each problem with its remedy, and an ACL line to copy.

    Checks Redis, the rights of its user, its latency and clock, the backends, the licences' keys and the ledger's
    folder. The exit code is 1 if there is a problem; warnings do not count.

    Example: limiter doctor --redis redis://localhost:6379/0
    """
    settings = read_settings(config, redis=redis)
    logging.getLogger("limiter").setLevel(logging.CRITICAL)  # the table has it all
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
        OUT.print("\nA Redis user with exactly the rights that are needed; replace PASSWORD with your own:")
        OUT.print(f"  {line}", markup=False, soft_wrap=True)


def _sentence(finding: Finding) -> Text:
    return Text(f"{finding.text}: {finding.advice}" if finding.advice else finding.text)
