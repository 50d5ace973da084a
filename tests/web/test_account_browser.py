"""Account and admin pages in Chromium: from sign-up to the cost of the first request, and axe on every page."""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.accounts.oidc_provider import CLIENT, SECRET, OidcProvider, provided
from tests.api.live import LocalService, running, until
from tests.web.people import PASSWORD, do, key_of, person
from unmask.accounts import Accounts, keys, people, tariff
from unmask.accounts.provider_settings import IdentityProviderSettings
from unmask.catalogue import votes
from unmask.catalogue.store import GateOutcome, add_gate_outcome, put_fields, step
from unmask.onboarding.gates import GATES
from unmask.storage.database import now_ms
from unmask.web import website

ACCOUNT = ["/account", "/account/keys", "/account/usage", "/account/requests", "/account/ledger", "/account/settings"]
ADMIN = ["/admin", "/admin/models", "/admin/providers", "/admin/prices", "/admin/plans", "/admin/audit"]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[OidcProvider]:
    with provided() as provider:
        yield provider


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory, elsewhere: OidcProvider) -> Iterator[Accounts]:
    folder = tmp_path_factory.mktemp("accounts")
    made = Accounts(
        f"sqlite:///{folder / 'accounts.sqlite'}",
        pepper=folder / "pepper",
        free_credit=1_000_000_000,
        provider=IdentityProviderSettings(issuer=elsewhere.url, client_id=CLIENT, client_secret=SECRET, name="Example"),
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(accounts: Accounts, tiny_llama: Path) -> Iterator[LocalService]:
    with running(tiny_llama, accounts, website, api_keys=(), accounts_url="kept by the test") as service:
        do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice(service.model, "default", 8_000_000), now_ms()))
        yield service


def opened(browser: Browser, site: LocalService, session: str = "", **context: object) -> Page:
    made = browser.new_context(base_url=site.url, **context)  # pyright: ignore[reportArgumentType]
    if session:
        made.add_cookies([{"name": "unmask_session", "value": session, "url": site.url}])
    return made.new_page()


def press(page: Page, name: str) -> None:
    """Press a form's button and wait for the page that it leads to, so that the next look is not at the old one."""
    with page.expect_navigation():
        page.get_by_role("button", name=name).click()


def faultless(page: Page) -> None:
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    results = Axe().run(page)
    assert results.violations_count == 0, (page.url, results.generate_report())
    width = page.viewport_size["width"] if page.viewport_size else 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width, page.url


@pytest.mark.parametrize("script", [True, False])
def test_from_signing_up_to_the_first_requests_cost(
    browser: Browser, site: LocalService, accounts: Accounts, script: bool
) -> None:
    email = f"ada{script}@example.org".lower()
    page = opened(browser, site, java_script_enabled=script)
    page.goto("/")
    page.get_by_role("link", name="Sign in").click()
    page.get_by_role("link", name="Sign up").click()
    page.get_by_label("Mail address").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign up").click()
    page.get_by_label("Mail address").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Account", exact=True)).to_be_visible()
    page.get_by_role("link", name="Make an API key.").click()
    page.get_by_label("Name", exact=True).fill("my first key")
    page.get_by_label("Spend limit, in dollars").fill("0.50")
    page.get_by_role("button", name="Make the key").click()
    key = page.locator("#new-key").inner_text()
    assert re.fullmatch(r"um_\w{12}_\w{49}", key)
    # The command on the page is a request that works, with this server's address.
    command = page.locator("#first-request").inner_text()
    assert f"{site.url}/v1/embeddings" in command and f'"model": "{site.model}"' in command
    reply = site.call("POST", "/v1/embeddings", {"model": site.model, "input": "some text"}, key=key)
    cost = f"${int(reply.headers['x-unmask-cost-nanodollars']) / 1e9:.9f}".rstrip("0")
    owner = do(accounts, lambda c: people.find_account(c, email)).id
    until(lambda: do(accounts, lambda c: people.account(c, owner)).held == 0)
    page.get_by_role("link", name="I have stored it").click()
    assert key not in page.content()
    page.get_by_role("link", name="Overview").click()
    expect(page.locator(".glance")).to_contain_text(cost)
    expect(page.get_by_role("img", name="Cost by day").first).to_be_visible()
    page.get_by_role("navigation", name="Your account").get_by_role("link", name="Requests").click()
    expect(page.get_by_role("row", name="my first key")).to_contain_text(cost)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("status")).to_have_text("You are signed out.")
    page.context.close()


def models_at_every_step(accounts: Accounts, who: people.Person, source: Path, name: str) -> None:
    """Add models in every status, each with a long name, a long note and long findings of gates."""
    ways = {
        "requested": ("requested",),
        "failed": ("coming soon", "benchmarking", "coming soon"),
        "measured": ("coming soon", "benchmarking"),
        "staged": ("coming soon", "benchmarking", "staged"),
        "live": ("coming soon", "benchmarking", "staged", "live"),
        "ending": ("coming soon", "benchmarking", "staged", "live", "deprecated"),
        "over": ("coming soon", "retired"),
    }
    with accounts.database.begin() as connection:
        for what, way in ways.items():
            model = f"{name}/a-model-with-one-very-long-name-that-nobody-can-break-{what}-{'x' * 30}"
            put_fields(connection, model, {}, source=str(source))
            for status in way:
                until = date(2100, 1, 1) if status == "deprecated" else None
                step(connection, model, status, actor=who.id, until=until)
            for at, gate in enumerate(GATES[: 3 if what == "failed" else len(GATES)]):
                passed = what != "failed" or at < 2
                add_gate_outcome(
                    connection, model, GateOutcome(gate.name, "of the test", passed, "A finding. " * 9 + "y" * 80, {})
                )
            votes.vote(connection, who.account_id, model, f"for {what} " + "z" * 90, now_ms())
            if what in ("live", "ending"):
                votes.notify_voters(connection, model, now_ms())


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_and_nothing_sticks_out(
    browser: Browser, site: LocalService, accounts: Accounts, golden_dir: Path, scheme: str, width: int
) -> None:
    who = person(accounts, f"a-rather-long-address-of-{scheme}-{width}@subdomain.example.org", admin=True)
    key = key_of(accounts, who, name="a name of one very-long-word-that-nobody-can-break-" + "x" * 40, spend_limit=5)
    ended = keys.key_id(key_of(accounts, who, name="ended"))
    do(accounts, lambda c: keys.revoke(c, who.account_id, ended, now_ms()))
    do(accounts, lambda c: keys.change(c, who.account_id, keys.key_id(key), keys.KeySettings(name="x" * 90), now_ms()))
    assert site.call("POST", "/v1/embeddings", {"model": site.model, "input": "a"}, key=key).status == 200
    until(lambda: do(accounts, lambda c: people.account(c, who.account_id)).held == 0)
    models_at_every_step(accounts, who, golden_dir / "tiny_gemma", f"org-{scheme}")
    session = do(accounts, lambda c: people.create_session(c, who.id, now_ms()))
    size = {"width": width, "height": 900}
    page = opened(browser, site, color_scheme=scheme, viewport=size)
    complaints: list[str] = []
    for path in ("/sign-in?done=signed-up", "/sign-up", "/first-admin?invitation=x"):
        page.goto(path)
        faultless(page)
    page.context.close()
    page = opened(browser, site, session, color_scheme=scheme, viewport=size)
    page.on("console", lambda message: complaints.append(message.text))
    more = [f"/account/keys/{keys.key_id(key)}", f"/account/keys/{ended}", f"/admin/accounts/{who.account_id}",
            "/account/usage?by=key&what=tokens", "/account/keys?done=changed", "/account/votes"]  # fmt: skip
    for path in (*ACCOUNT, *ADMIN, *more):
        assert page.goto(path)
        faultless(page)
    assert not complaints
    # Pages that answer a form, and pages with the error of a form.
    page.goto("/account/keys")
    press(page, "Make the key")
    faultless(page)
    page.goto(f"/account/keys/{keys.key_id(key)}")
    press(page, "Rotate the key")
    faultless(page)
    assert not complaints
    page.goto("/account/keys")
    page.get_by_label("Requests per minute").fill("none")
    page.get_by_role("button", name="Make the key").click()
    expect(page.get_by_role("alert")).to_contain_text("is no whole number")
    faultless(page)
    page.goto("/admin?find=nobody")
    expect(page.get_by_role("alert")).to_contain_text("No account has")
    faultless(page)
    page.goto("/admin/models")
    page.locator("input[name=status]").first.evaluate("element => element.value = 'benchmarking'")
    page.locator("form.asking button").first.click()
    expect(page.get_by_role("alert")).to_contain_text("is no step that can be taken here")
    faultless(page)
    page.context.close()
    seen = [path.partition("?")[0] for path in (*ACCOUNT, *ADMIN, *more)]
    for route in site.routes:
        if route.path.startswith(("/account", "/admin")) and "GET" in (route.methods or ()):
            assert route.path.endswith(".csv") or any(route.path_regex.match(path) for path in seen), route.path


def test_signing_in_elsewhere_and_linking_it(
    browser: Browser, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    """Only a real browser enforces form-action and SameSite."""
    person(accounts, "linked@example.org")
    elsewhere.person = {"sub": "linked", "email": "linked@example.org", "email_verified": True}
    page = opened(browser, site)
    page.goto("/sign-in?next=/account/settings")
    faultless(page)
    page.get_by_role("link", name="Sign in with Example").click()
    expect(page.get_by_role("alert")).to_contain_text("An account here has your mail address already")
    page.get_by_label("Mail address").fill("linked@example.org")
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Sign in")
    page.goto("/account/settings")
    faultless(page)
    page.locator("#own_password").fill(PASSWORD)
    press(page, "Link it")
    faultless(page)
    page.get_by_role("link", name="Go on to Example").click()
    expect(page.get_by_role("status")).to_contain_text("From now on you can sign in that way as well.")
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("link", name="Sign in with Example").click()
    expect(page).to_have_url(f"{site.url}/account")
    elsewhere.person = None
