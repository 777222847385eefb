"""`limiter config`: the settings in force and the source of each value."""

from rich.table import Table

from limiter.cli._console import ConfigOption, JsonOption, print_json, print_table
from limiter.config.loader import load_settings


def config(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Print the settings in force and the source of each value. Secrets are masked.

    Example: LIMITER_RELAY__PORT=9090 limiter config
    """
    settings = load_settings(config)[1]
    if json:
        print_json([{"name": item.name, "value": item.value, "origin": item.origin} for item in settings])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for item in settings:
        table.add_row(item.name, item.value, item.origin)
    print_table(table)
