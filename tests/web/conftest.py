"""Servers with pages, and a browser. `tests/api/live.py` starts the servers."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.api.live import LocalService, running
from unmask.api.metrics import Metrics
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import WebPages
from unmask.catalogue import Catalogue
from unmask.checkpoint import DEFAULT_MODEL
from unmask.router import ModelRegistry
from unmask.web import AccountHooks, Site, build_pages, website

HTML = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}

COMING = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
REFERENCE = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT = DEFAULT_MODEL


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
    """`start(catalogue, hooks, **settings)` starts a server for one test."""
    with ExitStack() as stack:

        def start_server(
            catalogue: Catalogue | None = None, hooks: AccountHooks | None = None, **changes: object
        ) -> LocalService:
            def build(models: ModelRegistry, settings: ServeSettings, metrics: Metrics, accounts: object) -> WebPages:
                own_catalogue = catalogue or Catalogue.shipped()
                return build_pages(Site(own_catalogue, models, settings, metrics, hooks or AccountHooks()))

            return stack.enter_context(running(tiny_llama, build_pages=build, **{"api_keys": (), **changes}))

        yield start_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium. Each test opens its own context."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if not program:
        pytest.skip("no browser to look at the pages with; get one with: apt-get install chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=60_000)
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()
