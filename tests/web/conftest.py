"""Servers with pages; what a server is is in `tests/api/live.py`."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.api.live import LocalService, running
from unmask.catalogue import Catalogue
from unmask.web import Seams, Website, website

HTML = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}

COMING = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
REFERENCE = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT = "unmask/smollm2-135m-embed"


@pytest.fixture(scope="session")
def tiny_llama(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


@pytest.fixture(scope="session")
def service(tiny_llama: Path, golden_dir: Path) -> Iterator[LocalService]:
    """A server with pages over two models, the second one cold. No key is needed."""
    both = (str(tiny_llama), str(golden_dir / "tiny_gemma"))
    with running(tiny_llama, build_pages=website, api_keys=(), models=both) as started:
        yield started


@pytest.fixture
def start(tiny_llama: Path) -> Iterator[Callable[..., LocalService]]:
    """`start(catalogue, seams, **settings)` is a server of the test's own."""
    with ExitStack() as stack:

        def begin(catalogue: Catalogue | None = None, seams: Seams | None = None, **changes: object) -> LocalService:
            build = lambda models, settings, metrics, accounts: Website(  # noqa: E731 - as short as the thing it is
                catalogue or Catalogue.shipped(), models, settings, metrics, seams or Seams()
            ).site()
            return stack.enter_context(running(tiny_llama, build_pages=build, **{"api_keys": (), **changes}))

        yield begin


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium. Each test opens a context of its own in it."""
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if not found:
        pytest.skip("no browser to look at the pages with; get one with: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()
