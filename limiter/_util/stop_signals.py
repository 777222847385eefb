"""The signals that stop a long-running command."""

import asyncio
import signal
from collections.abc import Callable


def on_stop_signal(stop: Callable[[], object]) -> None:
    """Call `stop` in the running loop on SIGTERM, and on SIGINT unless the process was started with SIGINT ignored.

    A shell starts a script's background jobs that way: a Ctrl-C at the terminal is not meant for them.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGINT, stop)
