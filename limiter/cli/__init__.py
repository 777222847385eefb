"""The `limiter` command: one module a group of commands, settings read once at the top.

Exit codes: 0 done; 1 it could not be done, and one line on stderr says why; 2 wrong usage.
"""

from limiter.cli.main import main

__all__ = ["main"]
