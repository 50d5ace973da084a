"""The program that commands are added to, and its voice."""

import sys

from cyclopts import App

from unmask import __version__

app = App(
    name="unmask",
    help="Turn a decoder-only LLM into a text encoder, and serve its vectors behind an OpenAI-compatible API.",
    version=f"unmask {__version__}",
    version_flags=["--version", "-V"],
)


def say(line: str) -> None:
    """Tell the user, on stderr: stdout is for results."""
    print(line, file=sys.stderr)  # noqa: T201 - talking to the user is this module's work
