"""Processes that fork from one which has torch loaded, so that a test that kills five of them takes seconds."""

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tiny import write_pairs


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """`processes.Process(...)` starts at once, and knows nothing of this process but its arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny"])
    return context


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pairs.tsv`."""
    return write_pairs(tmp_path_factory.mktemp("data"))
