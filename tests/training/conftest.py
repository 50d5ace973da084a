"""Fixtures: processes that are forked from one with torch loaded, so that a test that kills five takes seconds."""

from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from tests.fork_server import fork_server
from tests.training.tiny import write_pairs
from unmask.training import curves


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """`processes.Process(...)` starts at once, and knows nothing of this process but its arguments."""
    return fork_server()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes above: sums are equal to the bit only where as many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves at the end of a run: that takes a second, and test_curves.py tests it."""
    monkeypatch.setattr(curves, "draw_curves", lambda folder: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pairs.tsv`."""
    return write_pairs(tmp_path_factory.mktemp("data"))
