"""Sign-in, account and admin pages over HTTP."""

import csv
import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from argon2 import Parameters, PasswordHasher, extract_parameters
from starlette.requests import Request

from tests.api.live import LocalService, Reply, running, until
from tests.web.conftest import HTML
from tests.web.html import Page
from tests.web.people import PASSWORD, Visitor, do, key_of, person
from unmask.accounts import Accounts, audit, keys, ledger, people, tariff, usage
from unmask.accounts.limits import BucketTake, LocalLimiter
from unmask.accounts.verification import verify
from unmask.server.announcement import create_invitation
from unmask.storage.database import now_ms
from unmask.web import sessions, website
from unmask.web.forms import Form

FREE = 1_000_000_000
POISON = "<img src=x onerror=alert(1)>\"'>{{7*7}}"
# Where the API answers, in every dialect. It takes keys and no sessions, so its requests need no token of a form.
API_PATHS = ("/v1/", "/v2/", "/api/", "/openai/", "/embed", "/tokenize")


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    folder = tmp_path_factory.mktemp("accounts")
    made = Accounts(f"sqlite:///{folder / 'accounts.sqlite'}", pepper=folder / "pepper", free_credit=FREE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(accounts: Accounts, tiny_llama: Path) -> Iterator[LocalService]:
    with running(tiny_llama, accounts, website, api_keys=(), accounts_url="kept by the test") as service:
        do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice(service.model, "default", 8_000_000), now_ms()))
        yield service


@pytest.fixture(autouse=True)
def first_try(accounts: Accounts) -> None:
    """Reset the limit of sign-in tries: all tests come from one address."""
    accounts.membership._limiter = LocalLimiter()


def text(reply: Reply) -> str:
    return Page(reply.body.decode()).text


def embed(site: LocalService, key: str, input: str = "a text") -> Reply:
    return site.call("POST", "/v1/embeddings", {"model": site.model, "input": input}, key=key)


def signed_up(site: LocalService, email: str) -> Visitor:
    """Sign up and in by the forms."""
    visitor = Visitor(site)
    assert visitor.fill("/sign-up", email=email, password=PASSWORD).status == 303
    reply = visitor.fill("/sign-in", email=email, password=PASSWORD)
    assert (reply.status, reply.headers["location"]) == (303, "/account")
    return visitor


def test_from_signing_up_to_signing_out(site: LocalService) -> None:
    visitor = signed_up(site, "ada@example.org")
    page = visitor.page("/account")
    assert "$1.00" in page.text and "ada@example.org" in page.text and "Start here" in page.text
    old = dict(visitor.cookies)
    reply = visitor.fill("/account", "/sign-out")
    assert reply.headers["location"] == "/sign-in?done=signed-out"
    assert "unmask_session" not in visitor.cookies
    again = Visitor(site)
    again.cookies = old
    assert again.get("/account").headers["location"] == "/sign-in?next=%2Faccount"


def test_free_credit_is_given_once(site: LocalService, accounts: Accounts) -> None:
    visitor = signed_up(site, "once@example.org")
    assert "$1.00" in visitor.page("/account").text
    form = {"password": PASSWORD, "sure": "yes"}
    assert visitor.fill("/account/settings", "/account/delete", **form).headers["location"].endswith("done=deleted")
    again = signed_up(site, "Once@Example.org")
    assert "$0.00" in again.page("/account").text
    assert do(accounts, verify).drift == ()


def test_the_cookie_is_for_nobody_else(site: LocalService, accounts: Accounts, tiny_llama: Path) -> None:
    person(accounts, "cookie@example.org")
    reply = Visitor(site).fill("/sign-in", email="cookie@example.org", password=PASSWORD)
    cookie = reply.headers["set-cookie"]
    assert cookie.startswith("unmask_session=")
    assert {"HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=1209600"} <= set(cookie.split("; "))
    assert "Secure" not in cookie  # the test's server has no https
    public = "https://embed.example.org"
    with running(tiny_llama, accounts, website, api_keys=(), accounts_url="kept", public_url=public) as service:
        visitor = Visitor(service)
        reply = visitor.fill("/sign-in", email="cookie@example.org", password=PASSWORD)
        cookie = reply.headers["set-cookie"]
        assert cookie.startswith("__Host-unmask_session=") and "; Secure" in cookie
        assert "cookie@example.org" in visitor.page("/account").text


@pytest.mark.parametrize("path", ["/account", "/account/keys", "/sign-in", "/sign-up", "/first-admin", "/admin"])
def test_private_pages_are_kept_by_no_cache(site: LocalService, accounts: Accounts, path: str) -> None:
    admin = person(accounts, f"cache{path.replace('/', '-')}@example.org", admin=True)
    visitor = Visitor.signed_in(site, accounts, admin) if path.startswith(("/account", "/admin")) else Visitor(site)
    reply = visitor.get(path)
    assert reply.status == 200 and reply.headers["cache-control"] == "private, no-store"
    assert "script-src 'self'" in reply.headers["content-security-policy"]
    assert "form-action 'self'" in reply.headers["content-security-policy"]
    page = Page(reply.body.decode())
    assert not [element for element, attributes in page.elements if "style" in attributes or "onclick" in attributes]


def test_a_public_page_is_nobody_elses_either(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "public@example.org")
    mine, theirs = Visitor.signed_in(site, accounts, who).get("/models"), Visitor(site).get("/models")
    assert mine.headers["vary"] == "accept, cookie, host" and mine.headers["cache-control"] == "private, no-cache"
    assert "/account" in Page(mine.body.decode()).links() and "/sign-in" in Page(theirs.body.decode()).links()
    assert mine.headers["etag"] != theirs.headers["etag"]


def test_signing_up_tells_nobody_who_is_here(site: LocalService, accounts: Accounts) -> None:
    person(accounts, "known@example.org")
    answers = []
    for email in ("known@example.org", "new@example.org"):
        visitor = Visitor(site)
        token = visitor.token("/sign-up")
        reply = visitor.post("/sign-up", {"token": token, "email": email, "password": "another password"})
        answers.append((reply.status, reply.headers["location"], reply.headers.get("set-cookie"), reply.body))
    assert answers[0] == answers[1]
    # The password of the existing account has not changed.
    assert Visitor(site).fill("/sign-in", email="known@example.org", password=PASSWORD).status == 303


def test_signing_in_tells_nobody_who_is_here(
    site: LocalService, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answer and work are the same for a known and an unknown address: one argon2 hash, most of the time."""
    person(accounts, "timed@example.org")
    verified: list[Parameters] = []
    verify_password = PasswordHasher.verify

    def counted(self: PasswordHasher, hash: str, password: str) -> bool:
        verified.append(extract_parameters(hash))
        return verify_password(self, hash, password)

    monkeypatch.setattr(PasswordHasher, "verify", counted)
    replies: set[tuple[int, str]] = set()
    work = {}
    for email in ("timed@example.org", "nobody@example.org"):
        visitor = Visitor(site)
        token = visitor.token("/sign-in")
        verified.clear()
        reply = visitor.post("/sign-in", {"token": token, "email": email, "password": "wrong password"})
        replies.add((reply.status, text(reply).replace(email, "")))
        work[email] = list(verified)
    assert len(replies) == 1 and next(iter(replies))[0] == 401
    assert work["timed@example.org"] == work["nobody@example.org"] and len(verified) == 1


def test_tries_are_counted_by_mail_and_by_place(site: LocalService, accounts: Accounts) -> None:
    limiter = accounts.membership._limiter = LocalLimiter(clock=lambda: 0.0)
    who = accounts.peppers.permanent_digest("sign-in guess@example.org")
    limiter.take_now([BucketTake(f"sign-in:{who}", 10, 9), BucketTake("sign-in-from:127.0.0.1", 30, 28)], "requests")
    visitor = Visitor(site)
    assert visitor.fill("/sign-in", email="guess@example.org", password="x").status == 401
    reply = visitor.fill("/sign-in", email="Guess@example.org", password="x")
    assert reply.status == 429 and "Too many tries" in text(reply) and int(reply.headers["retry-after"]) > 0
    assert visitor.fill("/sign-up", email="one@example.org", password="short").status == 400
    for path in ("/sign-in", "/sign-up"):  # another mail, and the same place
        assert visitor.fill(path, email="two@example.org", password=PASSWORD).status == 429


def test_only_a_trusted_proxy_says_who_comes(site: LocalService, accounts: Accounts, tiny_llama: Path) -> None:
    who = person(accounts, "proxied@example.org")
    key = key_of(accounts, who, scopes=("account",), networks=("203.0.113.0/24",))

    def tried(service: LocalService, email: str, forwarded: str) -> int:
        visitor = Visitor(service)
        form = {"token": visitor.token("/sign-in"), "email": email, "password": "x"}
        return visitor.post("/sign-in", form, **{"x-forwarded-for": forwarded}).status

    def read(service: LocalService, forwarded: str) -> int:
        return service.call("GET", "/v1/account", headers={"x-forwarded-for": forwarded}, key=key).status

    limiter = accounts.membership._limiter = LocalLimiter(clock=lambda: 0.0)
    limiter.take_now([BucketTake("sign-in-from:203.0.113.7", 30, 30)], "requests")
    settings = {"api_keys": (), "accounts_url": "kept", "trusted_proxies": ("127.0.0.0/8", "10.1.0.0/16")}
    with running(tiny_llama, accounts, website, **settings) as behind:
        assert tried(behind, "one@example.org", "203.0.113.7") == 429
        assert tried(behind, "two@example.org", "203.0.113.8") == 401
        # A visitor can invent the first addresses; the one that the outermost trusted proxy saw counts.
        assert tried(behind, "three@example.org", "203.0.113.9, 203.0.113.7, 10.1.2.3") == 429
        assert [read(behind, f) for f in ("203.0.113.7", "198.51.100.1", "203.0.113.7, 198.51.100.1")] == [
            200,
            403,
            403,
        ]
        assert read(behind, "no address") == 403
        # Over https, as reported by the proxy, cookies are secure.
        reply = behind.call("GET", "/sign-in", headers={**HTML, "x-forwarded-proto": "https"}, key=None)
        assert reply.headers["set-cookie"].startswith("__Host-")
    # A server without trusted proxies ignores the header.
    assert tried(site, "four@example.org", "203.0.113.7") == 401
    assert read(site, "203.0.113.7") == 403


ELSEWHERE = (
    "//evil.example", "///evil.example", "https://evil.example/", "https:evil.example", "https:/evil.example",
    "HTTPS://evil.example", "/\\evil.example", "\\\\evil.example", "\\/evil.example", "/\t/evil.example",
    "/%09/evil.example",
    "/%0a/evil.example", "/%00/evil.example", "/.//evil.example", "/..//evil.example", "/%2e//evil.example",
    "/account//evil.example", "/account/..//evil.example", "/account/%2e%2e//evil.example", "/%2f/evil.example",
    "/%2fevil.example", "/%5cevil.example", "/%255cevil.example", "/%252fevil.example", "//user@evil.example",
    "/@evil.example", "/account@evil.example/", "javascript:alert(1)", "data:text/html,x", " //evil.example",
    "\u3000//evil.example", "/account\r\nLocation: https://evil.example", "/account%0d%0aLocation:x",
    "?next=//evil.example",
    "evil.example", "/account;@evil.example", "/account#//evil.example", "/acc\u00f6unt", "\uff0f\uff0fevil.example",
)  # fmt: skip
NO_PAGES = (
    "/no-such-page",
    "/account/no-such-page",
    "/v1/../account",
    "/sign-out",
    "/sign-in",
    "/sign-in/provider",
    "/account/delete",
)


@pytest.mark.parametrize("next", [*ELSEWHERE, *NO_PAGES])
def test_an_address_that_is_no_page_here_is_not_gone_on_to(site: LocalService, accounts: Accounts, next: str) -> None:
    who = site_person(accounts) or person(accounts, "return@example.org")
    reply = Visitor.signed_in(site, accounts, who).get(f"/sign-in?next={quote(next, safe='')}")
    assert (reply.status, reply.headers["location"]) == (303, "/account")
    page = Visitor(site).get(f"/sign-in?next={quote(next, safe='')}")
    assert 'name="next" value=""' in page.body.decode()


@pytest.mark.parametrize(
    "next", ["/", "/account", "/account/usage?by=key&days=7", "/models", "/models/unmask/smollm2-135m", "/compare"]
)
def test_a_page_here_is_gone_on_to(site: LocalService, accounts: Accounts, next: str) -> None:
    who = site_person(accounts) or person(accounts, "return@example.org")
    reply = Visitor.signed_in(site, accounts, who).get(f"/sign-in?next={quote(next, safe='')}")
    assert (reply.status, reply.headers["location"]) == (303, next)


def site_person(accounts: Accounts) -> people.Person | None:
    """The person whom the tests of return addresses share."""
    return next((each for each in do(accounts, people.list_people) if each.email == "return@example.org"), None)


@pytest.mark.parametrize(
    "next", ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:alert(1)", "/.//evil"]
)
def test_signing_in_leads_nowhere_else(site: LocalService, accounts: Accounts, next: str) -> None:
    if not do(accounts, lambda c: people.stored_password(c, "lead@example.org")):
        person(accounts, "lead@example.org")
    reply = Visitor(site).fill("/sign-in", email="lead@example.org", password=PASSWORD, next=next)
    assert reply.headers["location"] == "/account"
    reply = Visitor(site).fill("/sign-in", email="lead@example.org", password=PASSWORD, next="/account/usage?by=key")
    assert reply.headers["location"] == "/account/usage?by=key"


def test_a_form_from_elsewhere_is_refused(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "forged@example.org")
    visitor, other = Visitor.signed_in(site, accounts, who), Visitor(site)
    for token in ("", "x" * 64, other.token("/sign-in"), "é"):
        reply = visitor.post("/account/keys", {"token": token, "name": "forged", "scopes": "account"})
        assert reply.status == 403 and "This form is too old" in text(reply)
    assert do(accounts, lambda c: keys.list_keys(c, who.account_id, now_ms())) == []
    # Signing a visitor in to the attacker's account is a forgery too.
    attacker = other.token("/sign-in")
    for path in ("/sign-in", "/sign-up", "/first-admin"):
        form = {"token": attacker, "email": "forged@example.org", "password": PASSWORD, "invitation": "x"}
        assert Visitor(site).post(path, form).status == 403


def test_a_token_dies_with_its_session(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "dies@example.org")
    first, second = (Visitor.signed_in(site, accounts, who) for _ in range(2))
    token = first.token()
    assert second.post("/account/keys", {"token": token, "scopes": "account"}).status == 403
    assert first.post("/account/keys", {"token": token, "scopes": "account"}).status == 200


def test_every_form_asks_for_its_token(site: LocalService, accounts: Accounts) -> None:
    admin = person(accounts, "every@example.org", admin=True)
    visitor = Visitor.signed_in(site, accounts, admin)
    made = keys.key_id(key_of(accounts, admin))
    forms = 0
    for route in site.routes:
        if "POST" not in (route.methods or ()) or route.path == "/playground":
            continue
        if route.path == "/" or route.path.startswith(API_PATHS):
            assert visitor.post(route.path, {"name": "x"}).status == 401, route.path  # a session is no API key
            continue
        id = admin.account_id if "/admin/" in route.path else made
        path = route.path.replace("{id}", id)
        assert visitor.post(path, {"name": "x"}).status == 403, path
        forms += 1
    assert forms >= 14


def test_the_first_admin(site: LocalService, accounts: Accounts, tmp_path: Path, tiny_llama: Path) -> None:
    fresh = Accounts(f"sqlite:///{tmp_path / 'a.sqlite'}", pepper=tmp_path / "pepper")
    try:
        with running(tiny_llama, fresh, website, api_keys=(), accounts_url="kept") as service:
            link = create_invitation(fresh, service.url)
            assert link and link.startswith(f"{service.url}/first-admin?invitation=")
            path = link.removeprefix(service.url)
            invitation = path.partition("=")[2]
            visitor = Visitor(service)
            form = {"email": "root@example.org", "password": PASSWORD}
            refusal = visitor.fill(path, "/first-admin", **form, invitation="x" * 43)
            assert refusal.status == 401 and "used or is too old" in text(refusal)
            reply = visitor.fill(path, "/first-admin", **form, invitation=invitation)
            assert (reply.status, reply.headers["location"]) == (303, "/admin")
            assert "root@example.org" in visitor.page("/admin").text
            second = Visitor(service)
            again = {"email": "second@example.org", "password": PASSWORD, "invitation": invitation}
            assert second.fill(path, "/first-admin", **again).status == 401
            assert [one.admin for one in do(fresh, people.list_people)] == [True]
            assert create_invitation(fresh, service.url) is None
            assert second.get(path).headers["referrer-policy"] == "same-origin"
    finally:
        fresh.close()


def test_a_key_with_every_setting(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "settings@example.org")
    visitor = Visitor.signed_in(site, accounts, who)
    reply = visitor.fill(
        "/account/keys",
        name="nightly",
        scopes=["embeddings"],
        models=[site.model],
        spend_limit="2.50",
        spend_window="month",
        requests_per_minute="1,000",
        tokens_per_minute="50000",
        networks="127.0.0.1\n10.0.0.0/8",
        expires="2031-12-31",
    )
    assert reply.status == 200 and reply.headers["cache-control"] == "private, no-store"
    made = re.search(r"um_\w{12}_\w{49}", text(reply))
    assert made
    (key,) = do(accounts, lambda c: keys.list_keys(c, who.account_id, now_ms()))
    assert key.settings == keys.KeySettings(
        name="nightly",
        scopes=("embeddings",),
        models=(site.model,),
        networks=("127.0.0.1", "10.0.0.0/8"),
        requests_per_minute=1000,
        tokens_per_minute=50000,
        spend_limit=2_500_000_000,
        spend_window="month",
        expires_at=1_956_528_000_000,
    )
    assert embed(site, made[0]).status == 200
    assert site.call("GET", "/v1/account", key=made[0]).status == 403
    for path in ("/account/keys", f"/account/keys/{key.id}", "/account"):
        assert made[0] not in visitor.get(path).body.decode()
    (event,) = [e for _, e in do(accounts, lambda c: audit.events(c, subjects=[who.account_id]))]
    assert (event.action, event.actor, event.detail, event.address) == (
        "key.create", who.id, {"key": key.id}, "127.0.0.1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("spend_limit", "-1", "no amount of dollars"),
        ("spend_limit", "1e3", "no amount of dollars"),
        ("requests_per_minute", "0", "no whole number"),
        ("tokens_per_minute", "many", "no whole number"),
        ("networks", "10.0.0.0/33", "write an address"),
        ("expires", "2020-01-01", "is over"),
        ("expires", "soon", "write it like"),
        ("expires", "9999-12-31", "is too late"),
        ("models", "org/unknown", "choose out of the list"),
        ("spend_window", "day", "needs a spend limit"),
        ("scopes", "everything", "choose from"),
        ("name", "x" * 101, "at most 100"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_typed_is_lost(
    site: LocalService, accounts: Accounts, field: str, value: str, words: str
) -> None:
    who = person(accounts, f"wrong-{field}-{len(value)}-{len(words)}@example.org")
    visitor = Visitor.signed_in(site, accounts, who)
    typed: dict[str, str] = {"name": "kept for me", "scopes": "embeddings", field: value}
    reply = visitor.fill("/account/keys", **typed)
    page = Page(reply.body.decode())
    assert reply.status == 400 and words in page.text
    assert typed["name"] in [one.get("value") for one in page.all("input") if one.get("name") == "name"]
    assert do(accounts, lambda c: keys.list_keys(c, who.account_id, now_ms())) == []


def test_changing_rotating_and_revoking_a_key(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "rotate@example.org")
    old = key_of(accounts, who, name="old", expires_at=now_ms() + 3_600_123)
    id = keys.key_id(old)
    visitor = Visitor.signed_in(site, accounts, who)
    page = visitor.page(f"/account/keys/{id}")
    (day,) = [one["value"] for one in page.all("input") if one.get("name") == "expires"]
    before = do(accounts, lambda c: keys.get(c, who.account_id, id, now_ms())).settings.expires_at
    form = {"name": "renamed", "scopes": ["embeddings", "account"], "expires": day}
    assert visitor.fill(f"/account/keys/{id}", **form).headers["location"].endswith("done=changed")
    after = do(accounts, lambda c: keys.get(c, who.account_id, id, now_ms())).settings
    assert after.name == "renamed" and after.expires_at == before  # the form shows only the day, and the hour is kept
    reply = visitor.fill(f"/account/keys/{id}", f"/account/keys/{id}/rotate", hours="0")
    made = re.search(r"um_\w{12}_\w{49}", text(reply))
    assert made and embed(site, made[0]).status == 200 and embed(site, old).status == 401
    assert visitor.fill(f"/account/keys/{id}", f"/account/keys/{id}/rotate", hours="5").status == 400
    new = keys.key_id(made[0])
    visitor.fill(f"/account/keys/{new}", f"/account/keys/{new}/revoke")
    assert embed(site, made[0]).status == 401
    assert "revoked" in visitor.page(f"/account/keys/{new}").text
    actions = [e.action for _, e in do(accounts, lambda c: audit.events(c, subjects=[who.account_id]))]
    assert actions == ["key.revoke", "key.rotate", "key.change"]


def test_usage_ledger_and_requests_agree_with_the_books(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "usage@example.org")
    key = key_of(accounts, who, name="=HYPERLINK(1)")
    replies = [embed(site, key, "some text " * n) for n in (1, 2, 3)]
    costs = [int(reply.headers["x-unmask-cost-nanodollars"]) for reply in replies]
    until(lambda: do(accounts, lambda c: people.account(c, who.account_id)).held == 0)
    visitor = Visitor.signed_in(site, accounts, who)
    total = f"${sum(costs) / 1e9:.9f}".rstrip("0")
    for path in (
        "/account",
        "/account/usage",
        "/account/usage?by=key&what=tokens",
        "/account/usage?by=tier&what=requests",
    ):
        page = visitor.page(path)
        assert total in page.text, path
        assert len([bar for bar in page.all("rect") if bar.get("class", "").startswith("bar")]) == 2  # wide and narrow
    requests, lines = visitor.page("/account/requests").text, visitor.page("/account/ledger").text
    for reply, cost in zip(replies, costs, strict=True):
        dollars = f"${cost / 1e9:.9f}".rstrip("0")
        assert reply.headers["x-request-id"][:20] in requests and dollars in requests and f"−{dollars}" in lines
    assert "for usage@example.org" in lines

    rows = {
        name: list(csv.DictReader(io.StringIO(visitor.get(f"/account/{name}.csv").body.decode())))
        for name in ("usage", "requests", "ledger")
    }
    assert [(row["model"], row["requests"]) for row in rows["usage"]] == [(site.model, "3")]
    assert [round(float(row["cost"]) * 1e9) for row in reversed(rows["requests"])] == costs
    assert sum(round(float(row["amount"]) * 1e9) for row in rows["ledger"]) == 1_000_000_000 - sum(costs)
    assert {row["kind"] for row in rows["ledger"]} == {"charge", "top_up"}
    reply = visitor.get("/account/ledger.csv", accept="*/*")
    assert reply.headers["content-disposition"] == 'attachment; filename="ledger.csv"'
    assert reply.headers["content-type"].startswith("text/csv")


def test_long_lists_have_pages_and_csv_has_all(site: LocalService, accounts: Accounts, monkeypatch) -> None:
    monkeypatch.setattr("unmask.web.account.pages._CSV_PAGE", 20)
    who = person(accounts, "long@example.org", nano=0)
    amounts = range(1, 121)

    def many(connection) -> None:
        for amount in amounts:
            ledger.top_up(connection, who.account_id, amount, f"long {amount}", now_ms())

    do(accounts, many)
    visitor = Visitor.signed_in(site, accounts, who)
    notes: list[str] = []
    path: str | None = "/account/ledger"
    while path:
        page = visitor.page(path)
        notes += re.findall(r"long \d+", page.text)
        path = next((link for link in page.links() if "before=" in link), None)
    assert notes == [f"long {amount}" for amount in reversed(amounts)]
    rows = list(csv.DictReader(io.StringIO(visitor.get("/account/ledger.csv").body.decode())))
    assert [row["reference"] for row in rows] == notes


@pytest.mark.parametrize(
    "query",
    ["start=yesterday", "start=2020-01-01&end=2026-01-01", "what=gold", "by=name", "start=2026-02-02&end=2026-02-01"],
)
def test_a_wrong_question_is_the_visitors(site: LocalService, accounts: Accounts, query: str) -> None:
    who = person(accounts, f"q{abs(hash(query))}@example.org")
    reply = Visitor.signed_in(site, accounts, who).get(f"/account/usage?{query}")
    assert reply.status == 400 and "is not valid" in text(reply)


def test_another_password_ends_every_session(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "password@example.org")
    one, two = (Visitor.signed_in(site, accounts, who) for _ in range(2))
    refusal = one.fill("/account/settings", "/account/password", old="not it", new="another password")
    assert refusal.status == 401 and "The password is not right." in text(refusal)
    short = one.fill("/account/settings", "/account/password", old=PASSWORD, new="short")
    assert short.status == 400
    reply = one.fill("/account/settings", "/account/password", old=PASSWORD, new="another password")
    assert reply.headers["location"] == "/sign-in?done=password"
    assert two.get("/account").status == 303
    assert Visitor(site).fill("/sign-in", email=who.email, password=PASSWORD).status == 401
    assert Visitor(site).fill("/sign-in", email=who.email, password="another password").status == 303


def test_deleting_needs_the_password_and_the_tick(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "delete@example.org")
    key = key_of(accounts, who)
    visitor = Visitor.signed_in(site, accounts, who)
    assert visitor.fill("/account/settings", "/account/delete", password=PASSWORD).status == 400
    assert visitor.fill("/account/settings", "/account/delete", password="wrong", sure="yes").status == 401
    assert visitor.fill("/account/settings", "/account/delete", password=PASSWORD, sure="yes").status == 303
    assert visitor.get("/account").status == 303 and embed(site, key).status == 401
    assert do(accounts, lambda c: people.account(c, who.account_id)).state == "closed"
    assert do(accounts, verify).drift == ()


def test_what_an_admin_does(site: LocalService, accounts: Accounts) -> None:
    root, who = person(accounts, "admin@example.org", admin=True), person(accounts, "customer@example.org")
    key = key_of(accounts, who)
    admin = Visitor.signed_in(site, accounts, root)
    here = f"/admin/accounts/{who.account_id}"
    assert admin.get("/admin?find=Customer@example.org").headers["location"] == here
    missing = admin.get("/admin?find=nobody@example.org")
    assert missing.status == 400 and "No account has" in text(missing)

    def balance() -> int:
        return do(accounts, lambda c: people.account(c, who.account_id)).balance

    form = {"dollars": "12.50", "reference": "invoice 7", "note": "thanks"}
    assert admin.fill(here, f"{here}/top-up", **form).headers["location"] == f"{here}?done=topped-up"
    again = admin.fill(here, f"{here}/top-up", **form)
    assert again.status == 409 and "nothing was added" in text(again)
    assert admin.fill(here, f"{here}/top-up", dollars="1,5", reference="x").status == 400
    assert balance() == 13_500_000_000

    charged = embed(site, key)
    cost, charge = int(charged.headers["x-unmask-cost-nanodollars"]), charged.headers["x-unmask-charge"]
    until(lambda: balance() == 13_500_000_000 - cost)
    assert charge in admin.page(here).text
    assert admin.fill(here, f"{here}/refund", charge=charge).status == 303
    assert balance() == 13_500_000_000
    assert admin.fill(here, f"{here}/refund", charge=charge).status == 409
    other = f"/admin/accounts/{person(accounts, 'third@example.org').account_id}"
    assert admin.fill(other, f"{other}/refund", charge=charge).status == 409  # of another account

    admin.fill(here, f"{here}/state", state="frozen")
    assert embed(site, key).status == 403
    assert "frozen" in Visitor.signed_in(site, accounts, who).page("/account").text
    admin.fill(here, f"{here}/state", state="active")
    assert embed(site, key).status == 200

    limits = {"name": "tiny", "requests_per_minute": "1", "tokens_per_minute": ""}
    assert admin.fill("/admin/plans", **limits).status == 303
    admin.fill(here, f"{here}/plan", plan="tiny")
    assert [embed(site, key).status for _ in range(2)] == [200, 429]
    assert admin.fill(here, f"{here}/plan", plan="none").status == 400

    price = {"model": site.model, "tier": "batch", "dollars": "0.004"}
    assert admin.fill("/admin/prices", **price).status == 303
    assert "$0.004" in admin.page("/admin/prices").text
    assert admin.fill("/admin/prices", **price, remove="yes").status == 303
    assert "$0.004" not in admin.page("/admin/prices").text
    assert admin.fill("/admin/prices", model="unknown", tier="default", dollars="1").status == 400

    log = admin.page("/admin/audit").text
    for action in ("credit.top_up", "credit.refund", "account.freeze", "account.thaw", "plan.set", "plan.assign",
                   "price.set", "price.remove"):  # fmt: skip
        assert action in log and f"{root.id}" in log
    assert admin.get("/admin/accounts/acct_unknown").status == 404
    assert do(accounts, verify).drift == ()


def test_everybody_sees_the_prices_that_are_charged(
    site: LocalService, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.accounts.accounts._PRICE_S", 0.2)  # instead of five seconds
    admin = Visitor.signed_in(site, accounts, person(accounts, "prices@example.org", admin=True))
    key = key_of(accounts, person(accounts, "payer@example.org"))

    def displayed_prices() -> tuple[list[str], list[tuple[str, int, bool]]]:
        pages = [Visitor(site).page(path) for path in ("/models", f"/models/{site.model}")]
        api_prices = site.call("GET", f"/v1/models/{site.model}", key=key).json["prices"]
        listed = site.call("GET", "/v1/models", key=key).json["data"][0]["prices"]
        twin = json.loads(Visitor(site).get(f"/models/{site.model}.json").body)["prices"]
        assert api_prices == listed == twin
        assert all(
            f"${price['nanodollars_per_million_tokens'] / 1e9:g}" in page.text for price in api_prices for page in pages
        )
        return [page.text for page in pages], [tuple(price.values()) for price in api_prices]

    assert displayed_prices()[1] == [("standard", 8_000_000, False)]
    form = {"model": site.model, "dollars": "0.0625"}
    try:
        assert admin.fill("/admin/prices", tier="default", **form).status == 303
        assert displayed_prices()[1] == [("standard", 62_500_000, False)]
        reply = embed(site, key)
        assert int(reply.headers["x-unmask-cost-nanodollars"]) == math.ceil(reply.json["usage"]["total_tokens"] * 62.5)
        assert admin.fill("/admin/prices", tier="batch", model=site.model, dollars="0.03").status == 303
        assert displayed_prices()[1] == [("standard", 62_500_000, False), ("batch", 30_000_000, False)]
        for tier in tariff.TIERS:
            assert admin.fill("/admin/prices", tier=tier, remove="yes", **form).status == 303
        texts, prices = displayed_prices()
        assert prices == [] and "none set" in texts[1]
        # A price set on the command line arrives by the database alone.
        do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice("*", "default", 31_250_000), now_ms()))
        until(lambda: site.call("GET", f"/v1/models/{site.model}", key=key).json["prices"] != [])
        assert displayed_prices()[1] == [("standard", 31_250_000, False)]
    finally:
        do(accounts, lambda c: tariff.remove_price(c, "*", "default"))
        do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice(site.model, "default", 8_000_000), now_ms()))


def test_a_frozen_admin_is_no_admin(site: LocalService, accounts: Accounts) -> None:
    eve, root = person(accounts, "eve@example.org", admin=True), person(accounts, "eves-root@example.org", admin=True)
    visitor, admin = Visitor.signed_in(site, accounts, eve), Visitor.signed_in(site, accounts, root)
    here, cookies = f"/admin/accounts/{eve.account_id}", dict(visitor.cookies)
    token = visitor.token(here)
    assert admin.fill(here, f"{here}/state", state="frozen").status == 303
    assert visitor.get("/admin").headers["location"] == "/sign-in?next=%2Fadmin"
    for form in ({"state": "active"}, {"dollars": "500", "reference": "evil"}):
        path = f"{here}/state" if "state" in form else f"{here}/top-up"
        visitor.cookies = dict(cookies)
        assert visitor.post(path, {"token": token, **form}).headers["location"] == "/sign-in"
    visitor = Visitor(site)
    assert visitor.fill("/sign-in", email="eve@example.org", password=PASSWORD).status == 303
    assert "frozen" in visitor.page("/account").text and "/admin" not in visitor.page("/account").links()
    assert visitor.get("/admin").status == visitor.get(here).status == 403
    assert visitor.fill("/account", f"{here}/state", state="active").status == 403
    assert do(accounts, lambda c: people.account(c, eve.account_id)).state == "frozen"
    admin.fill(here, f"{here}/state", state="active")
    assert visitor.get("/admin").status == 200


def test_an_admin_frozen_while_a_form_is_sent(
    site: LocalService, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    eve, who = person(accounts, "slow@example.org", admin=True), person(accounts, "slow-customer@example.org")
    visitor, here = Visitor.signed_in(site, accounts, eve), f"/admin/accounts/{who.account_id}"
    read_form, token = sessions.read_form, visitor.token(here)

    async def read_slowly(request: Request) -> Form:
        form = await read_form(request)
        do(accounts, lambda c: people.set_frozen(c, eve.account_id, frozen=True))
        return form

    monkeypatch.setattr(sessions, "read_form", read_slowly)
    reply = visitor.post(f"{here}/top-up", {"token": token, "dollars": "500", "reference": "slow"})
    assert reply.headers["location"] == "/sign-in"
    assert do(accounts, lambda c: people.account(c, who.account_id)).balance == FREE


def test_addresses_that_no_database_takes(site: LocalService, accounts: Accounts) -> None:
    visitor = Visitor.signed_in(site, accounts, person(accounts, "odd@example.org", admin=True))
    for path in ("/account/keys/%00", "/account/requests?before=1.%00", "/admin?find=%00", "/admin?before=1.%00",
                 "/admin/accounts/%00"):  # fmt: skip
        reply = visitor.get(path)
        assert reply.status == 400 and "U+0000" in text(reply), path


def test_the_last_day_of_the_calendar(site: LocalService, accounts: Accounts) -> None:
    who = person(accounts, "last-day@example.org")
    visitor, key = Visitor.signed_in(site, accounts, who), key_of(accounts, who)
    for path in ("/account/usage", "/account/usage.csv"):
        for days in ("end=9999-12-31", "start=9999-12-31&end=9999-12-31"):
            assert visitor.get(f"{path}?{days}").status == 200, (path, days)
    assert site.call("GET", "/v1/usage?end=9999-12-31", key=key).status == 200


def test_only_admins_see_the_admins_pages(site: LocalService, accounts: Accounts) -> None:
    visitor = Visitor.signed_in(site, accounts, person(accounts, "plain@example.org"))
    assert "/admin" not in visitor.page("/account").links()
    for path in ("/admin", "/admin/prices", "/admin/plans", "/admin/audit", "/admin/accounts/x"):
        assert visitor.get(path).status == 403
        assert Visitor(site).get(path).headers["location"].startswith("/sign-in?next=%2Fadmin")


def test_names_are_text(site: LocalService, accounts: Accounts) -> None:
    root, who = person(accounts, "poison-admin@example.org", admin=True), person(accounts, "poison@example.org")
    key = key_of(accounts, who, name=POISON)
    embedded = site.call(
        "POST", "/v1/embeddings", {"model": site.model, "input": "x"}, {"x-request-id": "a.b:c"}, key=key
    )
    assert embedded.status == 200
    admin = Visitor.signed_in(site, accounts, root)
    here = f"/admin/accounts/{who.account_id}"
    admin.fill(here, f"{here}/top-up", dollars="1", reference=POISON, note=POISON)
    admin.fill("/admin/plans", name=POISON)
    visitor = Visitor.signed_in(site, accounts, who)
    id = keys.key_id(key)
    pages = [
        visitor.get(f"/account{path}") for path in ("", "/keys", f"/keys/{id}", "/usage?by=key", "/requests", "/ledger")
    ]
    pages += [admin.get(path) for path in (here, "/admin", "/admin/plans", "/admin/audit")]
    pages.append(visitor.fill("/account/keys", name=POISON, scopes="account"))
    pages.append(visitor.fill("/account/keys", name=POISON, scopes=POISON, networks=POISON, spend_limit=POISON))
    occurrences = 0
    for reply in pages:
        page = Page(reply.body.decode())
        assert not page.all("img"), reply.body
        occurrences += page.text.count(POISON)
    assert occurrences > 8


def test_no_secret_is_logged(
    site: LocalService, accounts: Accounts, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="unmask")
    capfd.readouterr()
    visitor = signed_up(site, "secret@example.org")
    made = re.search(r"um_\w{12}_\w{49}", text(visitor.fill("/account/keys", scopes="embeddings")))
    visitor.get("/first-admin?invitation=very-secret-invitation")
    assert made
    out = caplog.text + "".join(capfd.readouterr())
    assert "/sign-in" in out  # in whichever format this process logs
    for secret in (
        PASSWORD,
        made[0],
        visitor.cookies["unmask_session"],
        "very-secret-invitation",
        "secret@example.org",
    ):
        assert secret not in out


def test_without_accounts_there_is_nothing_of_it(service: LocalService) -> None:
    for path in ("/sign-in", "/sign-up", "/account", "/admin", "/first-admin"):
        assert service.call("GET", path, headers=HTML).status == 404
    assert "/sign-in" not in Page(service.call("GET", "/", headers=HTML).body.decode()).links()


def test_the_playground_is_closed_with_accounts(site: LocalService) -> None:
    assert Visitor(site).get("/playground").status == 404


def test_usage_by_day_is_the_ledgers(accounts: Accounts, site: LocalService) -> None:
    who = person(accounts, "days@example.org")
    assert do(accounts, lambda c: usage.account_of_charge(c, "chg_unknown")) is None
    assert "No request in the last 30 days" in Visitor.signed_in(site, accounts, who).page("/account").text
