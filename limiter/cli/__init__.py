"""The `limiter` command: one module for each command or group of commands; settings are read once, at the top.

Exit codes: 0 success; 1 failure, with its cause in one line on stderr; 2 wrong usage.
"""

import sys


def main() -> None:
    """Run the command line. The commands are imported within, so that Ctrl-C during the imports is quiet, too."""
    try:
        from limiter.cli.main import run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(130)
