"""The program that commands are added to; how it reads what is typed, and how it talks."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from cyclopts import App

from unmask import __version__

app = App(
    name="unmask",
    help="Turn a decoder-only LLM into a text encoder, and serve its vectors behind an OpenAI-compatible API.",
    version=f"unmask {__version__}",
    version_flags=["--version", "-V"],
)


# Who did it, in the audit log and in the steps of a model.
ACTOR = "command line"


def say(line: str) -> None:
    """Tell the user, on stderr: stdout is for results."""
    print(line, file=sys.stderr)  # noqa: T201 - talking to the user is this module's work


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows as a result. Columns that somebody copies from are not broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        made.add_column(heading, no_wrap=heading in ("account", "key", "entry", "when"))
    for row in rows:
        made.add_row(*(str(value) for value in row))
    Console().print(made)


def moment(milliseconds: int | None) -> str:
    """Unix milliseconds as a time in UTC; "" for none."""
    from datetime import UTC, datetime

    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def typed_dollars(text: str, *, zero: bool = False) -> int:
    """Nano-dollars of an amount that somebody typed.

    Raises:
        UsageError: it is none, or it is 0 and must not be.
    """
    from unmask.accounts.money import parse_dollars
    from unmask.errors import UsageError

    try:
        amount = parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if amount == 0 and not zero:
        raise UsageError(f"{text} dollars: it must be more than 0")
    return amount
