"""The first lines of a server, where they cannot be printed."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest

from unmask.api.settings import ServeSettings
from unmask.router import ModelRegistry
from unmask.server.announcement import announce


class FullStream(io.StringIO):
    """A stream that leads to a full disk."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


class EndedPipe(io.StringIO):
    """A pipe whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("stream", "reason"),
    [(None, "it is closed"), (FullStream(), "No space left on device"), (EndedPipe(), "Broken pipe")],
)
def test_a_server_that_cannot_print_its_first_lines_goes_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: Any, reason: str
) -> None:
    models = ModelRegistry([str(tiny_llama)])
    monkeypatch.setattr("sys.stdout", stream)
    with caplog.at_level(logging.WARNING, "unmask"):
        announce("http://127.0.0.1:1", models, ServeSettings(), None, None)
    [record] = caplog.records
    assert record.getMessage().startswith("the server answers at http://127.0.0.1:1, but its first lines")
    assert reason in record.getMessage()
