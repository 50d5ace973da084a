"""Help pages without boxes: readable at any width, searchable with grep, no escape codes in a pipe."""

import ast
import io
import textwrap
from typing import TYPE_CHECKING, Any

from unmask.terminal import terminal_width

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_WIDEST = 100
_LABELS = 26  # columns for names; the text of a longer name begins on the next line
_UNTOLD_DEFAULTS = (None, "()", "False", '""', "''")  # an option that is off or empty
_STACKED = 72  # narrower pages show each text below its names


class HelpPage:
    """Formats the pages of `--help` for cyclopts (its protocol `HelpFormatter`)."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Print a group of commands or options."""
        if not panel.entries:
            return
        self._print(console, f"{panel.title}:", style="bold")
        width = _page_width()
        entries = [(_labels(entry, panel.format), _description(entry)) for entry in panel.entries]
        column = 0 if width < _STACKED else min(max(len(labels) for labels, _ in entries), _LABELS) + 4
        for labels, text in entries:
            self._print(console, "\n".join(_entry_lines(labels, text, column, width)))
        self._print(console, "")

    def render_usage(self, console: "Console", options: "ConsoleOptions", usage: Any) -> None:
        """Print the line that shows how to call the command."""
        if usage:
            text = _plain(usage).strip()
            text = text if text.startswith("Usage:") else f"Usage: {text}"
            self._print(console, _fill(text, _page_width(), "", " " * len("Usage: ")) + "\n")

    def render_description(self, console: "Console", options: "ConsoleOptions", description: Any) -> None:
        """Print the command's description."""
        paragraphs = _plain(description).strip().split("\n\n") if description else []
        for paragraph in paragraphs:
            self._print(console, _fill(paragraph, _page_width()) + "\n")

    def _print(self, console: "Console", text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _entry_lines(labels: str, text: str, column: int, width: int) -> list[str]:
    """Return the lines of one command or option. `column` is where texts begin; 0 puts each text below its names."""
    if not column:
        indent = " " * 6
        return [*_fill(labels, width, "  ").splitlines(), *_fill(text, width, indent).splitlines()]
    lines = _fill(text, width, " " * column).splitlines()
    if len(labels) + 4 <= column and lines:
        return [f"  {labels}".ljust(column) + lines[0].strip(), *lines[1:]]
    return [f"  {labels}", *lines]


def _labels(entry: "HelpEntry", kind: str) -> str:
    if entry.positional_label:
        return entry.positional_label
    return ", ".join(entry.display_labels_with_metavar if kind == "parameter" else entry.display_labels)


def _description(entry: "HelpEntry") -> str:
    parts = [_plain(entry.description).strip()] if entry.description else []
    if entry.choices:
        parts.append(f"[choices: {', '.join(entry.choices)}]")
    if entry.env_var:
        parts.append(f"[environment: {', '.join(entry.env_var)}]")
    if entry.default is not None and entry.default not in _UNTOLD_DEFAULTS:
        parts.append(f"[default: {_default(entry.default)}]")
    if entry.required:
        parts.append("[required]")
    return " ".join(" ".join(parts).split())


def _default(text: str) -> str:
    """Show a tuple by its elements."""
    return ", ".join(str(element) for element in ast.literal_eval(text)) if text.startswith("(") else text


def _plain(value: Any) -> str:
    """Return the text of a rich renderable, without its line breaks at the console's width."""
    if isinstance(value, str):
        return value
    from rich.console import Console

    console = Console(file=io.StringIO(), width=10_000, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(value)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _fill(text: str, width: int, indent: str = "", next_indent: str | None = None) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent if next_indent is None else next_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _page_width() -> int:
    return min(terminal_width() or _WIDEST, _WIDEST)
