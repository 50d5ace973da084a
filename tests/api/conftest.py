"""Servers for the tests of the API; `live.py` starts them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.api.live import LocalService, running
from unmask.encoder import Encoder

# Runs in an environment of its own: LangChain's packages pin other versions of what this one holds.
collect_ignore = ["langchain_clients.py"]


@pytest.fixture(scope="session")
def tiny_llama(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


@pytest.fixture(scope="session")
def encoder(tiny_llama: Path) -> Encoder:
    """The model behind the services, asked directly."""
    return Encoder.load(tiny_llama)


@pytest.fixture(scope="session")
def service(tiny_llama: Path) -> Iterator[LocalService]:
    """The server that most tests share."""
    with running(tiny_llama) as started:
        yield started


@pytest.fixture
def start(tiny_llama: Path) -> Iterator[Callable[..., LocalService]]:
    """`start(**settings)` is a server of the test's own."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(running(tiny_llama, **changes))
