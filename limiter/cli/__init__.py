"""The `limiter` command: one module a group of commands, settings read once at the top.

Exit codes: 0 done; 1 it could not be done, and one line on stderr says why; 2 wrong usage.
"""

import sys


def main() -> None:
    """Run the command line. The commands are imported in here, so that Ctrl-C meanwhile ends quietly, too."""
    try:
        from limiter.cli.main import run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(130)
