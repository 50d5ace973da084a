"""The command line: parses, calls the rooms, prints. Nothing is decided here; one module per group of commands."""

import os
import sys
from collections.abc import Sequence

from unmask.cli import (  # noqa: F401 - each adds its commands to the program
    accounts,
    catalogue,
    encode,
    evaluate,
    keys,
    ledger,
    prices,
    serve,
    train,
)
from unmask.cli.program import app, say
from unmask.errors import UnmaskError

__all__ = ["app", "keep_few_products", "main"]

# A product that oneDNN compiled for one weight and number of rows takes half a megabyte, and torch keeps it once more.
# Each keeps a thousand, a gigabyte in the end, where a forward needs four at a time and has no use for the last one's.
_PRODUCTS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def keep_few_products() -> None:
    """Keep this process's memory flat, unless its environment says otherwise. To be called before the first forward."""
    for name, number in _PRODUCTS_KEPT.items():
        os.environ.setdefault(name, number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's own mistake is one line on stderr and exit code 1, never a traceback.

    Args:
        arguments: what follows `unmask`; None for what the process was started with.

    Raises:
        SystemExit: always, with the exit code.
    """
    keep_few_products()
    try:
        sys.exit(app(sys.argv[1:] if arguments is None else arguments))
    except UnmaskError as error:
        say(f"unmask: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("unmask: interrupted; run the same command again to continue")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our pipe has gone, as in `unmask encode ... --output - | head`.
        sys.stderr.close()
        sys.exit(141)
