"""The operator's page of providers in Chromium: one is added, admitted, drifts, is quarantined and readmitted."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.api.live import LocalService, running, until
from tests.router.fault_server import fault_server_thread
from tests.web.people import do, key_of, person
from tests.web.test_account_browser import faultless, press
from unmask.accounts import Accounts, audit, people, tariff
from unmask.encoder import Encoder
from unmask.router.pool import ProviderPool
from unmask.router.verdicts import Verdict, add_verdict
from unmask.router.watch_intervals import WatchIntervals
from unmask.storage.database import now_ms
from unmask.web import website

MODEL = "tiny_llama"
FAST = WatchIntervals(busy=0.5, idle=0.5, second=0.05, full=3600.0, retry=0.1)


def entry(name: str, url: str) -> str:
    return (
        f'[[provider]]\nname = "{name}"\nkind = "openai"\nurl = "{url}"\nprivate = true\nmax_cost_per_day = "5"\n'
        f'[[provider.model]]\nid = "{MODEL}"\ncost = "0.004"\n'
    )


def pool_of(service: LocalService) -> ProviderPool:
    assert service.models.providers is not None
    return service.models.providers


def admission(service: LocalService, name: str) -> str:
    endpoints = pool_of(service).models()[MODEL].endpoints
    return next((one.admission for one in endpoints if one.provider.name == name), "absent")


def page_of(browser: Browser, service: LocalService, session: str) -> Page:
    context = browser.new_context(base_url=service.url, viewport={"width": 1280, "height": 900})
    context.add_cookies([{"name": "unmask_session", "value": session, "url": service.url}])
    return context.new_page()


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(f"sqlite:///{tmp_path / 'accounts.sqlite'}", pepper=tmp_path / "pepper")


def test_a_provider_is_added_drifts_and_comes_back(
    browser: Browser, accounts: Accounts, tiny_llama: Path, tmp_path: Path
) -> None:
    encoder, lock, drifted = Encoder.load(str(tiny_llama)), threading.Lock(), threading.Event()

    def right(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        return -right(texts, instruction) if drifted.is_set() else right(texts, instruction)

    admin, customer = person(accounts, "admin@example.org", admin=True), person(accounts, "customer@example.org")
    key = key_of(accounts, customer)
    do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice(MODEL, "default", 8_000_000), now_ms()))
    session = do(accounts, lambda c: people.create_session(c, admin.id, now_ms()))
    file = tmp_path / "providers.toml"
    options = {"api_keys": (), "accounts_url": "kept by the test", "providers_file": file, "warm": ()}
    with fault_server_thread(right) as first, fault_server_thread(drifting) as second:
        head = f'remote_only = ["{MODEL}"]\n'
        file.write_text(head + entry("acme", first.url))
        with running(tiny_llama, accounts, website, intervals=FAST, **options) as service:  # pyright: ignore[reportArgumentType]
            until(lambda: admission(service, "acme") == "admitted")
            page = page_of(browser, service, session)
            page.goto("/admin/providers")
            expect(page.get_by_role("rowheader", name="acme").first).to_be_visible()
            # Added: as `unmask providers reload` does.
            file.write_text(head + entry("acme", first.url) + entry("gpu-2", second.url))
            do(
                accounts,
                lambda c: add_verdict(c, Verdict(provider="", model="", verdict="reload", actor="command line")),
            )
            until(lambda: admission(service, "gpu-2") == "admitted")
            body = {"model": MODEL, "input": "a ferry leaves", "provider": {"only": ["gpu-2"]}}
            assert service.call("POST", "/v1/embeddings", body, key=key).status == 200
            page.reload()
            expect(page.get_by_role("row", name="gpu-2").first).to_contain_text("admitted")
            drifted.set()
            until(lambda: admission(service, "gpu-2") == "quarantined")
            sentence = "gpu-2 rotates or mirrors the space: only inner products are right"
            endpoint = next(e for e in pool_of(service).models()[MODEL].endpoints if e.provider.name == "gpu-2")
            until(lambda: endpoint.finding == sentence)
            page.reload()
            expect(page.get_by_text(sentence).first).to_be_visible()
            expect(page.get_by_role("row", name="gpu-2").first).to_contain_text("quarantined")
            # The customer's answer came after the last right canary, or before it: then nothing is tainted.
            expect(page.get_by_role("heading", name="Answers that may be wrong")).to_be_visible()
            expect(page.get_by_role("region", name=f"Costs of the providers of {MODEL}")).to_contain_text("$5.00")
            faultless(page)
            page.screenshot(path=str(tmp_path / "providers.png"), full_page=True)
            drifted.clear()
            press(page, f"Check and admit gpu-2 for {MODEL}")
            expect(page.get_by_role("status")).to_contain_text("The provider is being checked")
            until(lambda: admission(service, "gpu-2") == "admitted")
            page.reload()
            expect(page.get_by_role("row", name="gpu-2").first).to_contain_text("admitted")
            form = page.locator("form.asking").filter(has=page.get_by_role("button", name="Quarantine acme"))
            form.get_by_role("button").click()
            expect(page.get_by_role("alert")).to_contain_text("A quarantine needs a reason")
            form.get_by_label("Reason").fill("maintenance")
            with page.expect_navigation():
                form.get_by_role("button").click()
            until(lambda: admission(service, "acme") == "quarantined")
            page.reload()
            expect(page.get_by_text("acme was quarantined by the operator: maintenance").first).to_be_visible()
            faultless(page)
            assert service.call("POST", "/v1/embeddings", body, key=key).headers["x-unmask-provider"] == "gpu-2"
            page.context.close()
            events = do(accounts, lambda c: audit.events(c, subjects=["acme", "gpu-2"]))
            assert [(event.action, event.actor, event.subject) for _, event in events] == [
                ("provider.quarantine", admin.id, "acme"),
                ("provider.admit", admin.id, "gpu-2"),
            ]
    accounts.close()


def test_a_models_page_has_price_limits_and_percentiles_also_on_a_phone(
    browser: Browser, accounts: Accounts, tiny_llama: Path, tmp_path: Path
) -> None:
    encoder, lock = Encoder.load(str(tiny_llama)), threading.Lock()

    def right(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    key = key_of(accounts, person(accounts, "customer@example.org"))
    do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice(MODEL, "default", 8_000_000), now_ms()))
    file = tmp_path / "providers.toml"
    options = {"api_keys": (), "accounts_url": "kept by the test", "providers_file": file, "warm": ()}
    with fault_server_thread(right) as first, fault_server_thread(right) as second:
        limits = "max_inputs = 32\nmax_tokens = 100\n"
        file.write_text(
            f'remote_only = ["{MODEL}"]\n'
            + entry("acme", first.url)
            + limits
            + entry("a-provider-of-a-long-name", second.url)
        )
        with running(tiny_llama, accounts, website, intervals=FAST, **options) as service:  # pyright: ignore[reportArgumentType]
            until(lambda: {admission(service, name) for name in ("acme", "a-provider-of-a-long-name")} == {"admitted"})
            body = {"model": MODEL, "input": "a ferry leaves", "provider": {"only": ["acme"]}}
            assert service.call("POST", "/v1/embeddings", body, key=key).status == 200
            listed = service.call("GET", f"/v1/models/{MODEL}/endpoints", key=key).json
            assert listed["prices"] == [
                {"tier": "standard", "nanodollars_per_million_tokens": 8_000_000, "estimated": False}
            ]
            acme, other = listed["data"]
            longest = service.models.list()[0].record.max_tokens
            assert (acme["max_inputs"], acme["max_tokens"]) == (32, 100)
            assert (other["max_inputs"], other["max_tokens"]) == (1024, longest)
            page = page_of(browser, service, "")
            for width in (1280, 360):
                page.set_viewport_size({"width": width, "height": 800})
                page.goto(f"/models/{MODEL}")
                providers = page.locator("section", has=page.get_by_role("heading", name="Providers", exact=True))
                expect(providers).to_contain_text("A million tokens cost $0.008, whoever answers.")
                row = providers.locator("tbody tr").first
                latency, speed = acme["latency_last_30m"], acme["throughput_last_30m"]
                expect(row).to_contain_text("32 × 100")
                expect(row).to_contain_text(f"{latency['p50']:.2g}, {latency['p90']:.2g}, {latency['p99']:.2g} s")
                expect(row).to_contain_text(f"{int(speed['p50']):,}")
                assert "0.004" not in providers.inner_text()  # our own cost
                faultless(page)
                providers.screenshot(path=str(tmp_path / f"model-{width}.png"))
                table = providers.locator("table")
                assert table.evaluate("element => element.scrollWidth <= element.parentElement.clientWidth"), width
            page.context.close()
    accounts.close()
