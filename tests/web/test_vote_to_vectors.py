"""A published model on its whole way: its page, a vote, onboarding, vectors."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.api.live import LocalService, running, until
from tests.mirror import BASE, FIRST_STAGE, PUBLISHED, published_mirror, small_data
from unmask.accounts import Accounts, keys, ledger, people
from unmask.accounts.keys import KeySettings
from unmask.encoder import Encoder
from unmask.storage.database import now_ms
from unmask.web import website


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    made = Accounts(f"sqlite:///{tmp_path / 'accounts.sqlite'}", pepper=tmp_path / "pepper")
    yield made
    made.close()


def signed_in(accounts: Accounts, service: LocalService) -> tuple[str, dict[str, str]]:
    """Return an API key with credit, and the session cookie of its owner."""

    # Not by asyncio: playwright has a loop of its own in this thread.
    now = now_ms()
    with accounts.database.begin() as connection:
        person = people.sign_up(connection, accounts.peppers, "ada@example.org", "no password fits", now)
        token = people.create_session(connection, person.id, now)
        ledger.top_up(connection, person.account_id, 10**9, "payment", 1)
        key = keys.create(connection, accounts.peppers, person.account_id, KeySettings(), 1)
    return key, {"name": "unmask_session", "value": token, "url": service.url}


def test_from_coming_soon_to_a_vector(
    browser: Browser, accounts: Accounts, tiny_llama: Path, golden_dir: Path, tmp_path: Path
) -> None:
    folder = published_mirror(golden_dir, tmp_path / "mirror")
    with running(tiny_llama, accounts, website, api_keys=(), warm=()) as service:
        key, cookie = signed_in(accounts, service)
        page = browser.new_context(base_url=service.url, viewport={"width": 1280, "height": 900}).new_page()

        # The page of the published model has its true specifications.
        page.goto(f"/models/{PUBLISHED}")
        expect(page.locator(".id .badge")).to_have_text("coming soon")
        glance = page.locator(".glance")
        expect(glance).to_contain_text("1.3 B")
        expect(glance).to_contain_text("2,048")
        expect(glance).to_contain_text("MIT")
        facts = page.locator(".facts").first
        expect(facts).to_contain_text("princeton-nlp/Sheared-LLaMA-1.3B")
        expect(facts).to_contain_text("1,279,887,360")
        expect(page.get_by_role("link", name="Sign in to vote")).to_be_visible()
        refused = service.call("POST", "/v1/embeddings", {"model": PUBLISHED, "input": "a text"}, key=key)
        assert refused.status == 404

        # A signed-in visitor votes.
        page.context.add_cookies([cookie])  # pyright: ignore[reportArgumentType] - playwright's own type is narrower
        page.reload()
        page.get_by_label("What would you use it for?").fill("to reproduce the paper")
        page.get_by_role("button", name="Vote for this model").click()
        expect(page.locator(".callout")).to_contain_text("1 vote for this model. One is yours")

        # The operator onboards it beside the running server, from a mirror of the hub on disk.
        command = [sys.executable, "-m", "unmask", "onboard", PUBLISHED, "--weights", str(folder),
                   "--compat", "reference", "--replace-specification", "--task", "STSBenchmark",
                   "--data", str(small_data(tmp_path / "data")), "--length", "8", "--length", "32",
                   "--callers", "1", "--callers", "4", "--seconds", "0.1", "--cost-per-hour", "0.10"]  # fmt: skip
        environment = {**os.environ, "UNMASK_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
        environment["UNMASK_DATABASE"] = str(tmp_path / "accounts.sqlite")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{PUBLISHED} is live." in done.stdout and "Voters notified: 1." in done.stdout

        # The running server shows it as live, with the measurements.
        until(lambda: PUBLISHED in [served["id"] for served in service.call("GET", "/v1/models", key=key).json["data"]])
        page.goto(f"/models/{PUBLISHED}")
        expect(page.locator(".id .badge")).to_have_text("live")
        expect(page.get_by_role("heading", name="Gates")).to_be_visible()
        expect(page.locator("figure.lines")).to_have_count(2)
        expect(page.locator("#history ~ ul")).to_contain_text("benchmarking")

        # Its vectors are charged, and equal those of the reference path.
        reply = service.call(
            "POST", "/v1/embeddings", {"model": PUBLISHED, "input": ["a text", "another  one"]},
            {"prefer": "wait=60"}, key,
        )  # fmt: skip
        assert reply.status == 200, reply.body
        mirror = tmp_path / "mirror"
        reference = Encoder.load(mirror / BASE, adapters=[mirror / FIRST_STAGE, folder], compat="reference")
        expected = reference.encode(["a text", "another  one"], normalize=True)
        np.testing.assert_allclose(reply.vectors, expected, atol=1e-6)
        assert reply.json["usage"]["cost"] > 0 and reply.json["model"] == PUBLISHED

        # Its page shows the answered requests, and the voter has a notice.
        page.reload()
        expect(page.locator("figure.lines")).to_have_count(4)
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        for path in (f"/models/{PUBLISHED}", "/account/votes", "/models?sort=votes"):
            if path != f"/models/{PUBLISHED}":
                page.goto(path)
            if path == "/account/votes":
                expect(page.locator(".events")).to_contain_text(f"{PUBLISHED} – new")
            results = Axe().run(page)
            assert results.violations_count == 0, results.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        page.context.close()
