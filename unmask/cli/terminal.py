"""Terminal output: messages, results, tables and progress. Readable from 60 columns on, plain in a pipe."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

_GAP = 2  # blanks between columns
_NARROWEST = 24  # a column of prose is not made narrower than this; the rows become blocks instead


def say(line: str) -> None:
    """Tell the user on stderr. Stdout is for results."""
    print(line, file=sys.stderr)  # noqa: T201 - the terminal is this module's work


def print_result(text: str) -> None:
    """Print a result on stdout."""
    print(text)  # noqa: T201 - the terminal is this module's work


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that `stream` (by default stdout) writes to; None for a pipe or file.

    The environment variable COLUMNS overrides both.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    unknown: str = "",
    as_json: bool = False,
) -> None:
    """Print rows as a result.

    Args:
        headings: names of the columns.
        rows: one value per column.
        right: headings of the columns to align at their right edge.
        unknown: text in place of None.
        as_json: print a JSON array with one object per row instead; its keys are the headings in snake_case.
    """
    if as_json:
        keys = [heading.replace(" ", "_") for heading in headings]
        print_result(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1, ensure_ascii=False))
        return
    cells = [[unknown if value is None else str(value) for value in row] for row in rows]
    for line in table_lines(headings, cells, terminal_width(), right):
        print_result(line)


def table_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, right: Sequence[str] = ()
) -> list[str]:
    """Lay out a table. No word is cut.

    Rows take one line each where they fit. In a narrower terminal long cells are broken between words, and where that
    is not enough, each row becomes a block with a line per column.

    Args:
        width: columns of the terminal; None for any number.
        right: headings of the columns to align at their right edge.
    """
    widths = [max(len(text) for text in column) for column in zip(headings, *rows, strict=True)]
    if width is not None:
        narrowed = _narrowed(widths, [headings, *rows], width)
        if narrowed is None:
            return _blocks(headings, rows, width)
        widths = narrowed
    lines = []
    for row in (headings, *rows):
        cells = [_wrapped(text, columns) for text, columns in zip(row, widths, strict=True)]
        for at in range(max(len(cell) for cell in cells)):
            parts = [
                f"{cell[at] if at < len(cell) else '':{'>' if heading in right else '<'}{columns}}"
                for cell, heading, columns in zip(cells, headings, widths, strict=True)
            ]
            lines.append((" " * _GAP).join(parts).rstrip())
    return lines


def _narrowed(widths: list[int], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths that fit into `width`, taken from the widest columns; None if there are none."""
    longest_words = [
        max((len(word) for text in column for word in text.split()), default=0) for column in zip(*rows, strict=True)
    ]
    lowest = [min(now, max(word, _NARROWEST)) for now, word in zip(widths, longest_words, strict=True)]
    widths = list(widths)
    excess = sum(widths) + _GAP * (len(widths) - 1) - width
    while excess > 0:
        widest = max(range(len(widths)), key=lambda at: (widths[at] > lowest[at], widths[at]))
        if widths[widest] == lowest[widest]:
            return None
        widths[widest] -= 1
        excess -= 1
    return widths


def _blocks(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A block per row: the first cell, then a line per further cell that is not empty."""
    indent = max((len(heading) for heading in headings[1:]), default=0) + 2 * _GAP
    lines = []
    for row in rows:
        lines.append(row[0] or headings[0])
        for heading, text in zip(headings[1:], row[1:], strict=True):
            if text:
                first, *others = _wrapped(text, max(width - indent, _NARROWEST))
                lines.append(f"{' ' * _GAP}{heading}".ljust(indent) + first)
                lines += [" " * indent + line for line in others]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def format_time(milliseconds: int | None) -> str:
    """Unix milliseconds as a time in UTC; "" for None."""
    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
