"""SIGHUP of a server: ignored until it can read its files again, and after its event loop has closed.

By default the signal ends a process. This module imports nothing of the server, so that the command line can ignore
the signal before it imports torch.
"""

import signal
from collections.abc import Callable
from contextlib import suppress


def on_hangup(act: Callable[[], None]) -> None:
    """Call `act` in the main thread at each SIGHUP, from now on to the end of the process.

    The handlers of an event loop end with it and give the signal its default back. This one stays.
    """
    with suppress(AttributeError, ValueError):  # Windows, or not the main thread, as in tests
        signal.signal(signal.SIGHUP, lambda number, frame: act())


def ignore_hangups() -> None:
    """Ignore SIGHUP. Processes that this one starts do not ignore it, as they would with SIG_IGN."""
    on_hangup(lambda: None)
