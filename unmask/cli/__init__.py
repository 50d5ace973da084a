"""The command line: parses arguments, calls the packages and prints. One module per command or group of commands."""

import os
import sys
from collections.abc import Sequence

from unmask.cli.program import build_app
from unmask.cli.version import asks_for_details, version_details
from unmask.errors import UnmaskError
from unmask.terminal import abandon_stdout, print_result, say

__all__ = ["build_app", "keep_few_products", "main"]

# oneDNN compiles a primitive for each weight and number of rows. It takes half a megabyte, and torch keeps
# a second copy. Both caches hold a thousand by default, in the end a gigabyte. A forward needs four at a time and
# reuses none.
_PRIMITIVE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def keep_few_products() -> None:
    """Limit oneDNN's caches, so that the memory of this process stays flat. Call it before the first forward.

    The environment takes precedence.
    """
    for name, capacity in _PRIMITIVE_CACHES.items():
        os.environ.setdefault(name, capacity)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake is one line on stderr and exit code 1, never a traceback.

    Args:
        arguments: the words after `unmask`; None for those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    from cyclopts import CycloptsError

    words = list(sys.argv[1:] if arguments is None else arguments)
    # Training fills its packs to a few numbers of rows and reuses each primitive in every step.
    if words[:1] != ["train"]:
        keep_few_products()
    try:
        if asks_for_details(words):
            print_result(version_details())
            sys.exit(0)
        literal = len(words) - words.index("--") - 1 if "--" in words else 0
        app = build_app(words[0] if words else None, literal)
        app(words, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        say(f"unmask: {' '.join(str(error).split())}")
        sys.exit(1)
    except UnmaskError as error:
        say(f"unmask: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        again = "with --resume" if words[:1] == ["train"] else "again"
        say(f"unmask: interrupted; run the same command {again} to continue")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the pipe has ended, as in `unmask encode ... --output - | head`.
        abandon_stdout()
        sys.stderr.close()
        sys.exit(141)
