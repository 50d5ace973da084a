"""A check of every model that `Encoder.load` has loaded.

The catalogue knows the right vectors of files, but this package must not import the catalogue. So the command line,
which imports both, passes a function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LoadCheck = Callable[[Any], None]  # of an `Encoder`, whose module imports this one

_checks: list[LoadCheck] = []


@contextmanager
def checking_loads(check: LoadCheck) -> Iterator[None]:
    """Call `check` with every encoder that `Encoder.load` loads during the block, in any thread.

    Args:
        check: raises an `UnmaskError` for an encoder that must not be used; the load then fails with it.
    """
    _checks.append(check)
    try:
        yield
    finally:
        _checks.remove(check)


def run_load_checks(encoder: Any) -> None:
    """Run the checks that are handed in at the moment."""
    for check in tuple(_checks):
        check(encoder)
