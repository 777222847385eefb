"""The signals that tell a long-running command to stop. It knows nothing of credits."""

import asyncio
import signal
from collections.abc import Callable


def on_stop_signal(stop: Callable[[], object]) -> None:
    """Call `stop` in the running loop on SIGTERM, and on SIGINT unless this process was started with it ignored.

    A shell starts a background job of a script so: a Ctrl-C at the terminal is then meant for others.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGINT, stop)
