"""Two accounts, every route: nothing of the one is ever shown to the other, or changed by it."""

import itertools
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.routing import Route

from tests.api.live import LocalService, running, until
from tests.web.people import PASSWORD, Visitor, do, key_of, person
from unmask.accounts import Accounts, keys, people, tariff
from unmask.accounts.people import Person
from unmask.storage.database import now_ms
from unmask.storage.schema import metadata
from unmask.web import website

# Words that are the first account's alone. What the second one puts into a form or an address is not among them.
NAME, NOTE, MAIL, REQUEST = "owl-of-ada", "for ada@example.org", "ada@example.org", "request-of-ada"


@pytest.fixture
def site(accounts: Accounts, golden_dir: Path) -> Iterator[LocalService]:
    with running(
        golden_dir / "tiny_llama", accounts, website, api_keys=(), accounts_url="kept", playground=True
    ) as service:
        do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice("*", "default", 8_000_000), now_ms()))
        yield service


def rows_of(accounts: Accounts, owner: Person) -> dict[str, list[Any]]:
    """Every row of every table in which the account, its person or one of its keys is named."""
    with accounts.database.read() as connection:
        own = {owner.id, owner.account_id} | {k.id for k in keys.list_keys(connection, owner.account_id, now_ms())}
        rows_by_table = {}
        for table in metadata.sorted_tables:
            rows = [tuple(row) for row in connection.execute(table.select())]
            # When a key was last used is written a moment later; nobody else has a part in it.
            rows_by_table[table.name] = sorted(
                repr(row) for row in rows if own & {v for v in row if isinstance(v, str)}
            )
    return rows_by_table


def test_nothing_of_one_account_is_shown_to_another_or_changed(accounts: Accounts, site: LocalService) -> None:
    ada = person(accounts, MAIL, nano=7_654_321_987)
    key = key_of(accounts, ada, name=NAME)
    embedding = {"model": site.model, "input": "a text"}
    again = {"idempotency-key": "of-ada"}
    made = site.call("POST", "/v1/embeddings", embedding, again | {"x-request-id": REQUEST}, key=key)
    assert made.status == 200
    charge = made.headers["x-unmask-charge"]
    until(lambda: do(accounts, lambda c: people.account(c, ada.account_id)).held == 0)
    accounts.sweep()
    session = Visitor.signed_in(site, accounts, ada)
    # What is hers is to be seen by herself, or the walk would prove nothing.
    own = "".join(session.get(f"/account{path}").body.decode() for path in ("", "/keys", "/requests", "/ledger"))
    secrets = (MAIL, NAME, NOTE, REQUEST, ada.account_id, keys.key_id(key), charge)
    assert [word for word in secrets if word not in own] == [ada.account_id]
    before = rows_of(accounts, ada)
    assert all(before[table] for table in ("accounts", "people", "sessions", "keys", "charges", "entries", "replays"))

    routes: list[Route] = site.routes
    ids = [ada.account_id, ada.id, keys.key_id(key), charge, site.model, "style.css"]
    numbers = itertools.count()
    seen: set[tuple[str, int]] = set()
    for route in routes:
        places = set(route.param_convertors)
        assert places <= {"id", "name", "model"}, f"{route.path}: the walk does not know what to put there"
        paths = {reduce(lambda path, place: path.replace(f"{{{place}}}", id), places, route.path_format) for id in ids}
        for path, method in itertools.product(sorted(paths), sorted((route.methods or set()) - {"HEAD"})):
            # Somebody new for each, who may have been signed out or deleted by the one before.
            bob = person(accounts, f"bob{next(numbers)}@example.org", nano=1_000_000)
            theirs = key_of(accounts, bob)
            visitor = Visitor.signed_in(site, accounts, bob)
            # What was sent, and what came back of it.
            tried = [(path, site.call(method, path, embedding if method == "POST" else None, again, key=theirs))]
            if method == "POST":
                form = {
                    "token": visitor.token(), "name": "taken", "scopes": "embeddings", "hours": "0", "sure": "yes",
                    "old": PASSWORD, "new": "another password", "password": PASSWORD, "email": "eve@example.org",
                    "state": "frozen", "dollars": "1", "reference": f"{path} 1", "plan": "default", "tier": "default",
                    "model": site.model, "charge": charge, "account": ada.account_id, "account_id": ada.account_id,
                    "id": keys.key_id(key), "key": keys.key_id(key), "person": ada.id, "next": "/account",
                    "texts": "one\ntwo",
                }  # fmt: skip
                tried.append((path, visitor.post(path, form)))
            else:
                address = f"{path}?account={ada.account_id}&account_id={ada.account_id}&person={ada.id}&find={MAIL}"
                tried += [(path, visitor.get(path)), (address, visitor.get(f"{address}&before=99999999"))]
                tried.append((address, site.call("GET", address, key=theirs)))
            for sent, reply in tried:
                assert reply.status < 500, (method, sent, reply.body)
                sent_to_sign_in = reply.headers.get("location", "").partition("?next")[0] == "/sign-in"
                seen.add((f"{method} {route.path}", 401 if sent_to_sign_in else reply.status))
                answer = unquote(reply.body.decode(errors="replace") + json.dumps(reply.headers))
                # A refusal may repeat what it was asked, and nothing else.
                leaked = [word for word in secrets if word in answer and word not in sent]
                assert not leaked, (method, sent, leaked)
    after = rows_of(accounts, ada)
    assert after == before
    walked = {name for name, _ in seen}
    assert len(walked) > 40
    # The walk got through the doors that are open to everybody who has signed in, and through no other.
    for name in ("GET /account", "GET /account/ledger.csv", "POST /account/keys", "GET /v1/usage"):
        assert (name, 200) in seen
    assert ("POST /account/delete", 303) in seen
    for name in walked:
        if "/admin" in name and "first-admin" not in name:
            assert {status for walked_name, status in seen if walked_name == name} <= {401, 403}, name
    for name in ("GET /account/keys/{id}", "POST /account/keys/{id}", "POST /account/keys/{id}/rotate",
                 "POST /account/keys/{id}/revoke"):  # fmt: skip
        assert {status for walked_name, status in seen if walked_name == name} <= {401, 404}, name


def test_without_a_session_nothing_private_is_shown(accounts: Accounts, site: LocalService) -> None:
    ada = person(accounts, MAIL)
    key_of(accounts, ada, name=NAME)
    before = rows_of(accounts, ada)
    for route in site.routes:
        if not route.path.startswith(("/account", "/admin")):
            continue
        path = route.path_format.replace("{id}", ada.account_id)
        reply = Visitor(site).get(path) if "GET" in (route.methods or ()) else Visitor(site).post(path, {"name": "x"})
        assert reply.status == 303 and reply.headers["location"].startswith("/sign-in"), path
        assert not reply.body
    assert rows_of(accounts, ada) == before
