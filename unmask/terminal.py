"""Terminal output: messages, results, tables and progress. Readable from 60 columns on, plain in a pipe."""

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live

_GAP = 2  # blanks between columns
_SECONDS_BETWEEN_LINES = 10.0  # progress in a pipe or file
_SECONDS_BETWEEN_OBJECTS = 1.0
_BAR = (8, 28)  # narrowest and widest progress bar
_NARROWEST = 24  # a column of prose is not made narrower than this; the rows become blocks instead


def say(line: str) -> None:
    """Tell the user on stderr. Stdout is for results."""
    stream = sys.stderr
    text = _fill(line, terminal_width(stream)) if stream.isatty() else line
    print(text, file=stream)


def abandon_stdout() -> None:
    """Lead stdout nowhere after a write failed. At exit Python would try again, and change the exit code to 120."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_result(text: str) -> None:
    """Print a result on stdout, as it is."""
    print(text)  # noqa: T201 - this module's work


def print_sentence(text: str) -> None:
    """Print a result in words, with line breaks between words where the terminal is narrow."""
    print_result(_fill(text, terminal_width()))


def print_json(value: Any) -> None:
    """Print a result as JSON."""
    print_result(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the columns of the terminal that `stream` (by default stdout) writes to; None for a pipe or file.

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

    Without rows, a terminal gets a sentence in place of the headings.
    """
    if as_json:
        keys = [heading.replace(" ", "_") for heading in headings]
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    cells = [[unknown if value is None else str(value) for value in row] for row in rows]
    if not cells and sys.stdout.isatty():
        say("nothing to list")
        return
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
    """Return widths that fit into `width`, taken from the widest columns; None if there are none."""
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
    """Return a block per row: the first cell, then a line per further cell that is not empty."""
    indent = max((len(heading) for heading in headings[1:]), default=0) + 2 * _GAP
    lines = []
    for row in rows:
        lines += _wrapped(row[0] or headings[0], width)
        for heading, text in zip(headings[1:], row[1:], strict=True):
            if text:
                first, *others = _wrapped(text, max(width - indent, _NARROWEST))
                lines.append(f"{' ' * _GAP}{heading}".ljust(indent) + first)
                lines += [" " * indent + line for line in others]
    return lines


def _fill(text: str, width: int | None) -> str:
    return text if width is None else "\n".join(_wrapped(text, width))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def format_time(milliseconds: int | None) -> str:
    """Format Unix milliseconds as a time in UTC; "" for None."""
    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


@dataclass(frozen=True)
class Step:
    """A piece of work and how far it is.

    Attributes:
        name: of the work. A new name starts a new clock.
        done, total: counts of `unit`; `total` is None while it is not known.
        details: further texts, the most important first. The last ones are left out where the terminal is narrow.
    """

    name: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    details: tuple[str, ...] = ()


class Progress:
    """Shows progress on stderr: one line that is redrawn on a terminal, else a line every ten seconds.

    Args:
        stream: another place to write to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._step = Step("")
        self._first = 0
        self._started = self._printed = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, step: Step) -> None:
        """Show how far the work is."""
        now = time.monotonic()
        if step.name != self._step.name or not self._started:
            self._first, self._started, self._printed = step.done, now, now
        self._step = step
        if self._stream.isatty():
            self._draw()
        elif now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self._line(None), file=self._stream, flush=True)

    def log(self, line: str) -> None:
        """Print a line that stays; in a pipe or file with the time of day."""
        stamp = "" if self._stream.isatty() else time.strftime("%H:%M:%S ")
        print(stamp + line, file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the line that is redrawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is not None:
            return  # it redraws itself
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self._stream)
        self._live = Live(
            get_renderable=lambda: Text(self._line(console.width - 1), no_wrap=True),
            console=console,
            refresh_per_second=8,
            transient=True,
        )
        self._live.start()

    def _line(self, width: int | None) -> str:
        step, elapsed = self._step, time.monotonic() - self._started
        advanced = step.done - self._first
        left = None if step.total is None or advanced <= 0 else max(step.total - step.done, 0) * elapsed / advanced
        return progress_line(step, left, width)


class JsonProgress:
    """Writes progress to stderr as a JSON object per line, at most one per second.

    Args:
        stream: another place to write to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._printed: float | None = None

    def show(self, state: Mapping[str, Any], last: bool = False) -> None:
        """Write a state, unless another one was written in the second before and this is not the last."""
        now = time.monotonic()
        if last or self._printed is None or now - self._printed >= _SECONDS_BETWEEN_OBJECTS:
            self._printed = now
            print(json.dumps(state, ensure_ascii=False), file=self._stream, flush=True)


def progress_line(step: Step, seconds_left: float | None, width: int | None) -> str:
    """Lay out a line of progress. No word is cut: parts that do not fit are left out.

    Args:
        seconds_left: estimate, None if there is none.
        width: columns of the terminal; None for a line without a bar and of any length.
    """
    total = "" if step.total is None else f" of {step.total:,}"
    counts = f"{step.done:,}{total} {step.unit}".rstrip() if step.done or step.total else ""
    left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
    parts = [part for part in (step.name, counts, *step.details, left) if part]
    if width is None:
        return ", ".join(parts)
    while len(parts) > 1 and len("  ".join(parts)) > width:
        # The name and the counts go last, the time left before them, the details first.
        parts.pop(-2 if left and parts[-1] == left and len(parts) > 3 else -1)
    line = "  ".join(parts)
    room = min(width - len(line) - 4, _BAR[1])
    if step.total and room >= _BAR[0]:
        filled = round(room * min(step.done / step.total, 1.0))
        line = f"[{'#' * filled}{'.' * (room - filled)}]  {line}"
    return line
