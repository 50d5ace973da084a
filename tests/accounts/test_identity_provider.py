"""Signing in with OpenID Connect: the steps of a browser, over HTTP, between a server and a small provider."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from joserfc.jwk import OctKey, RSAKey

from tests.accounts.oidc_provider import CLIENT, SECRET, OidcProvider, provided
from tests.accounts.postgres import Cluster
from tests.api.live import LocalService, running
from tests.web.html import Page
from tests.web.people import PASSWORD, do, person
from unmask.accounts import Accounts, audit, identity_provider, people
from unmask.accounts.identity_provider import AuthorizationRequest, Identity, IdentityProvider
from unmask.accounts.keys import Peppers
from unmask.accounts.limits import LocalLimiter
from unmask.accounts.provider_settings import IdentityProviderSettings
from unmask.accounts.verification import discrepancies, verify
from unmask.api import ServeSettings
from unmask.errors import UsageError
from unmask.storage.backup import backup, restore
from unmask.storage.database import Database, now_ms
from unmask.web import website

FREE = 1_000_000_000
NAME = "Example"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[OidcProvider]:
    with provided() as running:
        yield running


@pytest.fixture(autouse=True)
def straight(elsewhere: OidcProvider) -> None:
    elsewhere.straighten()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def accounts(
    request: pytest.FixtureRequest, elsewhere: OidcProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Accounts]:
    folder = tmp_path_factory.mktemp("accounts")
    if request.param == "postgresql":
        postgres: Cluster = request.getfixturevalue("postgres")
        url = postgres.database()
    else:
        url = f"sqlite:///{folder / 'accounts.sqlite'}"
    settings = IdentityProviderSettings(issuer=elsewhere.url, client_id=CLIENT, client_secret=SECRET, name=NAME)
    made = Accounts(url, pepper=folder / "pepper", free_credit=FREE, provider=settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(accounts: Accounts, golden_dir: Path) -> Iterator[LocalService]:
    with running(golden_dir / "tiny_llama", accounts, website, api_keys=(), accounts_url="kept by the test") as service:
        yield service


@pytest.fixture
def web_client(site: LocalService, accounts: Accounts) -> Iterator[httpx.Client]:
    # Every test here comes from one place, which may only try so often; and nothing is remembered of the provider.
    accounts.membership._limiter = LocalLimiter()
    assert accounts.provider
    accounts.provider._metadata = None
    with a_browser(site) as made:
        yield made


def a_browser(site: LocalService) -> httpx.Client:
    return httpx.Client(base_url=site.url, headers={"accept": "text/html"}, follow_redirects=True, trust_env=False)


def text(reply: httpx.Response) -> str:
    return " ".join(Page(reply.text).text.split())


def rows(accounts: Accounts, email: str) -> list[Any]:
    return do(accounts, lambda c: [p for p in people.list_people(c) if p.email == email])


def fill(web_client: httpx.Client, form_on: str, path: str, **fields: str) -> httpx.Response:
    inputs = Page(web_client.get(form_on).text).all("input")
    token = next(field["value"] for field in inputs if field.get("name") == "token")
    return web_client.post(path, data={"token": token, **fields})


def begun(web_client: httpx.Client) -> dict[str, str]:
    """The way to the provider, not gone: what the browser would take there."""
    reply = web_client.get("/sign-in/provider", follow_redirects=False)
    assert reply.status_code == 303
    return {name: values[0] for name, values in parse_qs(urlsplit(reply.headers["location"]).query).items()}


def test_from_the_button_to_the_account_and_back(
    web_client: httpx.Client, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "ada", "email": "Ada@Example.org", "email_verified": True}
    page = Page(web_client.get("/sign-in?next=/account/usage").text)
    button = next(link for link in page.links() if link.startswith("/sign-in/provider"))
    assert f"Sign in with {NAME}" in page.text and page.text.count(NAME) == 1
    reply = web_client.get(button)
    assert reply.status_code == 200 and reply.url.path == "/account/usage"
    steps = [urlsplit(str(step.url)).path for step in reply.history]
    assert steps == ["/sign-in/provider", "/authorize", "/sign-in/provider/return"]
    assert "unmask_visit" not in web_client.cookies and "unmask_session" in web_client.cookies
    page = text(web_client.get("/account"))
    assert "$1.00" in page and "ada@example.org" in page
    # The same person with another address, in another browser, comes to the same account.
    elsewhere.person = {"sub": "ada", "email": "ada@elsewhere.example", "email_verified": True}
    with a_browser(site) as other:
        reply = other.get("/sign-in/provider")
        assert reply.url.path == "/account" and "ada@example.org" in text(reply) and "$1.00" in text(reply)
    assert len(rows(accounts, "ada@example.org")) == 1 and not rows(accounts, "ada@elsewhere.example")
    ada = rows(accounts, "ada@example.org")[0]
    done = do(accounts, lambda c: audit.events(c, subjects=[ada.id, ada.account_id]))
    assert [event.action for _, event in done] == ["person.sign_in", "person.sign_in", "person.sign_up"]
    assert {event.detail["issuer"] for _, event in done} == {elsewhere.url}
    # And another subject with her old address does not.
    elsewhere.person = {"sub": "eve", "email": "ada@example.org", "email_verified": True}
    with a_browser(site) as other:
        reply = other.get("/sign-in/provider")
        assert reply.status_code == 400 and "An account here has your mail address already" in text(reply)
    assert do(accounts, verify).drift == ()


def test_nobody_signs_in_with_a_password_that_was_never_set(
    web_client: httpx.Client, site: LocalService, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "bare", "email": "bare@example.org"}
    assert web_client.get("/sign-in/provider").url.path == "/account"
    with a_browser(site) as other:
        for password in ("", people.NO_PASSWORD, PASSWORD):
            reply = fill(other, "/sign-in", "/sign-in", email="bare@example.org", password=password)
            assert reply.status_code == 401


def test_an_address_with_a_password_stays_its_owners_and_is_linked_by_them(
    web_client: httpx.Client, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    owner = person(accounts, "owner@example.org")
    elsewhere.person = {"sub": "owner", "email": "owner@example.org", "email_verified": True}
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 400 and "unmask_session" not in web_client.cookies
    assert "sign in to it as before, and link Example on the page 'Settings'" in text(reply)
    assert do(accounts, lambda c: people.identities_of(c, owner.id)) == []
    fill(web_client, "/sign-in", "/sign-in", email="owner@example.org", password=PASSWORD)
    assert "Link it" in text(web_client.get("/account/settings"))
    reply = fill(web_client, "/account/settings", "/account/link", own_password="not it")
    assert reply.status_code == 401 and "The password is not right." in text(reply)
    reply = fill(web_client, "/account/settings", "/account/link", own_password=PASSWORD)
    on = next(link["href"] for link in Page(reply.text).all("a") if link.get("href", "").startswith(elsewhere.url))
    reply = web_client.get(on)
    assert reply.url.path == "/account/settings" and "From now on you can sign in that way as well." in text(reply)
    assert "Link it" not in text(reply) and elsewhere.url in text(reply)
    with a_browser(site) as other:
        assert "owner@example.org" in text(other.get("/sign-in/provider"))
        # The password is as good as before.
        with a_browser(site) as third:
            fill(third, "/sign-in", "/sign-in", email="owner@example.org", password=PASSWORD)
            assert third.get("/account").url.path == "/account"


def test_a_linked_identity_is_unlinked_by_whoever_knows_the_password(
    web_client: httpx.Client, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    owner = person(accounts, "linked@example.org")
    identity = Identity(issuer=elsewhere.url, subject="linked", email="linked@example.org", verified=True)
    do(accounts, lambda c: people.add_identity(c, owner.id, identity, now_ms()))
    elsewhere.person = {"sub": "linked", "email": "linked@example.org", "email_verified": True}
    with a_browser(site) as other:
        assert other.get("/sign-in/provider").url.path == "/account"
        fill(web_client, "/sign-in", "/sign-in", email="linked@example.org", password=PASSWORD)
        form = {"issuer": elsewhere.url, "unlink_password": PASSWORD}
        reply = fill(web_client, "/account/settings", "/account/unlink", **form | {"unlink_password": "not it"})
        assert reply.status_code == 401 and "The password is not right." in text(reply)
        reply = fill(web_client, "/account/settings", "/account/unlink", **form | {"issuer": "https://nowhere.example"})
        assert reply.status_code == 400 and "This sign-in is not linked to your account." in text(reply)
        reply = fill(web_client, "/account/settings", "/account/unlink", **form)
        assert reply.url.path == "/sign-in" and "You can sign in that way no longer" in text(reply)
        assert other.get("/account").url.path == "/sign-in", "every browser is signed out"
        reply = other.get("/sign-in/provider")
        assert reply.status_code == 400 and "link Example on the page 'Settings'" in text(reply)
    assert do(accounts, lambda c: people.identities_of(c, owner.id)) == []
    fill(web_client, "/sign-in", "/sign-in", email="linked@example.org", password=PASSWORD)
    assert "Unlink it" not in text(web_client.get("/account/settings"))


def test_whoever_has_no_password_cannot_unlink_the_only_way_in(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "only", "email": "only@example.org"}
    assert web_client.get("/sign-in/provider").url.path == "/account"
    assert "Unlink it" not in text(web_client.get("/account/settings"))
    reply = fill(web_client, "/account/settings", "/account/unlink", issuer=elsewhere.url)
    assert reply.status_code == 400 and "Set a password first" in text(reply)
    assert web_client.get("/account").url.path == "/account"


def test_an_identity_is_linked_to_one_account_only_and_by_nobody_else(
    web_client: httpx.Client, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "two", "email": "two@example.org", "email_verified": True}
    assert web_client.get("/sign-in/provider").url.path == "/account"
    second = person(accounts, "second@example.org")
    with a_browser(site) as other:
        fill(other, "/sign-in", "/sign-in", email="second@example.org", password=PASSWORD)
        reply = fill(other, "/account/settings", "/account/link", own_password=PASSWORD)
        on = next(link["href"] for link in Page(reply.text).all("a") if link.get("href", "").startswith(elsewhere.url))
        reply = other.get(on)
        assert reply.status_code == 400 and "This sign-in belongs to another account here" in text(reply)
        # Whoever signs out on the way does not link what they bring back.
        elsewhere.person = {"sub": "third", "email": "third@example.org"}
        reply = fill(other, "/account/settings", "/account/link", own_password=PASSWORD)
        on = next(link["href"] for link in Page(reply.text).all("a") if link.get("href", "").startswith(elsewhere.url))
        other.cookies.delete("unmask_session")
        reply = other.get(on)
        assert reply.status_code == 401 and "You have signed out, or in as somebody else" in text(reply)
    assert do(accounts, lambda c: people.identities_of(c, second.id)) == []


@pytest.mark.parametrize("defect", ["another state", "no state", "another browser's", "no cookie", "too late", "twice"])
def test_a_way_back_that_was_not_begun_here(
    web_client: httpx.Client,
    site: LocalService,
    accounts: Accounts,
    elsewhere: OidcProvider,
    defect: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere.person = {"sub": defect, "email": f"{defect.replace(' ', '-').replace(chr(39), '')}@example.org"}
    query = begun(web_client)
    back = dict(parse_qs(urlsplit(elsewhere.authorize(query)).query, strict_parsing=True))
    if defect == "another state":
        back["state"] = ["0" * 64]
    elif defect == "no state":
        del back["state"]
    elif defect == "another browser's":
        with a_browser(site) as other:
            back["state"] = [begun(other)["state"]]
    elif defect == "no cookie":
        web_client.cookies.clear()
    elif defect == "too late":
        monkeypatch.setattr(identity_provider, "now_ms", lambda: now_ms() + identity_provider.AUTHORIZATION_MS + 1)
    elif defect == "twice":
        cookie = web_client.cookies["unmask_visit"]
        assert web_client.get("/sign-in/provider/return", params=back).url.path == "/account"
        web_client.cookies.clear()
        web_client.cookies["unmask_visit"] = cookie
    asked_before = elsewhere.seen.count("/token")
    reply = web_client.get("/sign-in/provider/return", params=back)
    assert reply.status_code == 401 and "begin again" in text(reply) and "unmask_session" not in web_client.cookies
    # Only a code that was used is the provider's to refuse.
    assert elsewhere.seen.count("/token") == asked_before + (defect == "twice")
    if defect != "twice":
        assert not rows(accounts, elsewhere.person["email"])


def bad_token(bent: str, elsewhere: OidcProvider) -> None:
    now = now_ms() // 1000
    changes: dict[str, dict[str, Any]] = {
        "wrong nonce": {"nonce": "0" * 64},
        "no nonce": {"nonce": None},
        "wrong audience": {"aud": "another-client"},
        "for several, and another's": {"aud": [CLIENT, "another"], "azp": "another"},
        "for several, and nobody's": {"aud": [CLIENT, "another"]},
        "wrong issuer": {"iss": "https://evil.example"},
        "expired": {"exp": now - 3600},
        "without an end": {"exp": None},
        "from the future": {"iat": now + 3600},
        "of nobody": {"sub": None},
        "of a number": {"sub": 7},
    }
    elsewhere.bent = changes.get(bent, {})
    if bent == "another's signature":
        elsewhere.signs_with = RSAKey.generate_key(2048, {"kid": "of the test"})
    elif bent == "signed with the client secret":
        elsewhere.signs_with, elsewhere.algorithm = OctKey.import_key(SECRET), "HS256"
    elif bent == "unsigned":
        elsewhere.algorithm = "none"


@pytest.mark.parametrize(
    "bent",
    [
        "wrong nonce",
        "no nonce",
        "wrong audience",
        "for several, and another's",
        "for several, and nobody's",
        "wrong issuer",
        "expired",
        "without an end",
        "from the future",
        "of nobody",
        "of a number",
        "another's signature",
        "signed with the client secret",
        "unsigned",
    ],
)
def test_an_id_token_that_is_not_right(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider, bent: str
) -> None:
    elsewhere.person = {"sub": bent, "email": "bent@example.org", "email_verified": True}
    bad_token(bent, elsewhere)
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 401 and "What Example says of you cannot be believed" in text(reply)
    assert "/token" in elsewhere.seen and "unmask_session" not in web_client.cookies
    assert not rows(accounts, "bent@example.org")


def test_a_token_for_several_that_names_us_is_right(web_client: httpx.Client, elsewhere: OidcProvider) -> None:
    elsewhere.person = {"sub": "several", "email": "several@example.org"}
    elsewhere.bent = {"aud": ["another", CLIENT], "azp": CLIENT}
    assert web_client.get("/sign-in/provider").url.path == "/account"


@pytest.mark.parametrize(
    "path", ["/.well-known/openid-configuration", "/token", "/jwks", "another issuer", "gone", "no secret of ours"]
)
def test_a_provider_that_is_down_or_strange(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.person = {"sub": "down", "email": "down@example.org"}
    assert accounts.provider
    if path == "another issuer":
        elsewhere.issuer = "https://evil.example"
    elif path in ("gone", "no secret of ours"):
        ours = {"issuer": "http://127.0.0.1:9"} if path == "gone" else {"issuer": elsewhere.url}
        secret = SECRET if path == "gone" else "an old one"
        other = IdentityProviderSettings(**ours, client_id=CLIENT, client_secret=secret, name=NAME)
        monkeypatch.setattr(accounts.provider, "settings", other)
    else:
        elsewhere.broken = (path,)
    reply = web_client.get("/sign-in/provider", params={"next": "/account/usage"})
    assert reply.status_code == 503 and "Just now Example cannot be asked who you are" in text(reply)
    assert "unmask_session" not in web_client.cookies and "Password" in text(reply)  # which goes on working
    elsewhere.straighten()
    elsewhere.person = {"sub": "up again", "email": f"up{hash(path)}@example.org"}
    monkeypatch.undo()
    assert web_client.get("/sign-in/provider").url.path == "/account"


def test_whoever_does_not_agree_is_not_signed_in(web_client: httpx.Client, elsewhere: OidcProvider) -> None:
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 401 and "You were not signed in by Example" in text(reply)
    assert "555" not in text(reply)  # what an address says is not repeated


def test_an_address_that_is_missing_or_not_verified(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "without"}
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 401 and "No mail address came from Example" in text(reply)
    elsewhere.person = {"sub": "unsure", "email": "unsure@example.org", "email_verified": False}
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 401 and "Your mail address is not verified at Example" in text(reply)
    elsewhere.person["email_verified"] = "false"
    assert web_client.get("/sign-in/provider").status_code == 401
    elsewhere.person = {"sub": "strange", "email": "not an address"}
    assert web_client.get("/sign-in/provider").status_code == 400
    assert not rows(accounts, "unsure@example.org")


def test_an_address_from_the_user_info(web_client: httpx.Client, elsewhere: OidcProvider) -> None:
    elsewhere.methods = ("client_secret_post",)
    elsewhere.email_in = "userinfo"
    elsewhere.person = {"sub": "info", "email": "info@example.org", "email_verified": True}
    assert "info@example.org" in text(web_client.get("/sign-in/provider"))
    assert "/userinfo" in elsewhere.seen
    elsewhere.person = {"sub": "info2", "email": "info2@example.org"}
    elsewhere.bent = {"sub": "somebody else"}
    assert web_client.post("/sign-out", data={}).status_code == 403
    web_client.cookies.clear()
    assert web_client.get("/sign-in/provider").status_code == 503


def test_deleting_needs_a_fresh_session_and_forgets_the_identity(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.person = {"sub": "going", "email": "going@example.org"}
    web_client.get("/sign-in/provider")
    going = rows(accounts, "going@example.org")[0]
    page = Page(web_client.get("/account/settings").text)
    assert not [field for field in page.all("input") if field.get("name") in ("old", "password")]
    later = now_ms() + 11 * 60_000
    with monkeypatch.context() as patch:
        patch.setattr("unmask.accounts.membership.now_ms", lambda: later)
        for path, form in (("delete", {"sure": "yes"}), ("password", {"new": "another password"})):
            reply = fill(web_client, "/account/settings", f"/account/{path}", **form)
            assert reply.status_code == 401 and "You signed in too long ago for this" in text(reply)
    reply = fill(web_client, "/account/settings", "/account/delete", sure="yes")
    assert "The account is deleted." in text(reply)
    assert do(accounts, lambda c: people.identities_of(c, going.id)) == []
    # The free credit is given once per address, whichever way somebody comes.
    reply = web_client.get("/sign-in/provider")
    assert reply.url.path == "/account" and "$0.00" in text(reply)
    assert do(accounts, verify).drift == ()


def test_a_first_password(
    web_client: httpx.Client, site: LocalService, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    elsewhere.person = {"sub": "first", "email": "first@example.org"}
    web_client.get("/sign-in/provider")
    reply = fill(web_client, "/account/settings", "/account/password", new=PASSWORD)
    assert reply.url.path == "/sign-in" and "The password is changed" in text(reply)
    reply = fill(web_client, "/sign-in", "/sign-in", email="first@example.org", password=PASSWORD)
    assert reply.url.path == "/account"
    # From now on it is asked for.
    reply = fill(web_client, "/account/settings", "/account/password", old="not it", new="another password")
    assert reply.status_code == 401


def test_ways_to_the_provider_are_counted(
    web_client: httpx.Client, accounts: Accounts, elsewhere: OidcProvider
) -> None:
    accounts.membership._limiter = LocalLimiter(clock=lambda: 0.0)
    for _ in range(30):
        begun(web_client)
    reply = web_client.get("/sign-in/provider")
    assert reply.status_code == 429 and "Too many tries" in text(reply)
    assert elsewhere.seen.count("/.well-known/openid-configuration") == 1


def test_nothing_secret_is_logged_or_shown(
    web_client: httpx.Client,
    elsewhere: OidcProvider,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, logger="unmask")
    capfd.readouterr()
    elsewhere.person = {"sub": "secret-subject", "email": "quiet@example.org"}
    reply = web_client.get("/sign-in/provider")
    codes = [parse_qs(step.url.query.decode()).get("code") for step in reply.history]
    code = next(values[0] for values in codes if values)
    elsewhere.broken = ("/token",)
    web_client.cookies.clear()
    web_client.get("/sign-in/provider")
    out = caplog.text + "".join(capfd.readouterr())
    assert "/sign-in/provider/return" in out
    for secret in (SECRET, code, "secret-subject", "quiet@example.org", "code="):
        assert secret not in out
    settings = IdentityProviderSettings(issuer=elsewhere.url, client_id=CLIENT, client_secret=SECRET)
    assert SECRET not in repr(ServeSettings(accounts_url="kept", identity_provider=settings))


def test_a_backup_has_the_identities(accounts: Accounts, elsewhere: OidcProvider, tmp_path: Path) -> None:
    owner = person(accounts, "kept@example.org")
    identity = Identity(elsewhere.url, "kept", "", None)
    do(accounts, lambda c: people.add_identity(c, owner.id, identity, now_ms()))
    backup(accounts.database, tmp_path / "backup.gz")
    other = Database(str(tmp_path / "other.sqlite"))
    restore(other, tmp_path / "backup.gz", check=discrepancies)
    with other.read() as connection:
        assert people.person_of_identity(connection, identity) == owner
    other.close()


def test_without_a_provider_there_is_nothing_of_it(tmp_path: Path, golden_dir: Path) -> None:
    made = Accounts(f"sqlite:///{tmp_path / 'a.sqlite'}", pepper=tmp_path / "pepper")
    model = golden_dir / "tiny_llama"
    with running(model, made, website, api_keys=(), accounts_url="kept") as service, a_browser(service) as web_client:
        assert "Sign in with" not in text(web_client.get("/sign-in"))
        for path in ("/sign-in/provider", "/sign-in/provider/return"):
            assert web_client.get(path).status_code == 404
    made.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"issuer": "http://login.example.org"}, "give its https address"),
        ({"issuer": "login.example.org"}, "give its https address"),
        ({"issuer": "https://login.example.org/?a=b"}, "give its https address"),
        ({"client_id": ""}, "--oidc-client-id"),
        ({"client_secret": ""}, "UNMASK_OIDC_CLIENT_SECRET"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, str], message: str) -> None:
    good = {"issuer": "https://login.example.org/realm", "client_id": CLIENT, "client_secret": SECRET}
    assert IdentityProviderSettings(**good).name == "login.example.org"
    with pytest.raises(UsageError, match=message):
        IdentityProviderSettings(**good | changes)
    with pytest.raises(UsageError, match="turn on accounts as well"):
        ServeSettings(identity_provider=IdentityProviderSettings(**good))


def test_the_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "authlib.integrations.httpx_client", None)
    settings = IdentityProviderSettings(issuer="https://login.example.org", client_id=CLIENT, client_secret=SECRET)
    with pytest.raises(UsageError, match=r"pip install .*'authlib>=\S+'"):
        IdentityProvider(settings, Peppers(tmp_path / "pepper"))


def test_the_library_is_not_loaded_without_need() -> None:
    script = (
        "import unmask.web, unmask.server.http_server, sys; print('authlib' in sys.modules, 'httpx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


@pytest.mark.parametrize("text", ["", "1", "1.a.b", "x.a.b./", f"{'9' * 19}.a.b.", "-1.a.b."])
def test_what_is_no_visit(text: str) -> None:
    assert AuthorizationRequest.read(text) is None


def test_a_visit_is_what_it_was() -> None:
    visit = AuthorizationRequest.begin(person="person_1", next="/account/usage?by=key&what=a.b")
    assert AuthorizationRequest.read(str(visit)) == visit
    assert AuthorizationRequest.begin(next="/" + "x" * 1000).next == ""
