"""Cost of a page: bytes, requests and SQL statements. More models in the catalogue do not add to it.

Times are measured by `benchmarks/web_pages.py`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from sqlalchemy import Connection, event
from web_pages import large_catalogue

from tests.api.live import LocalService, running
from tests.web.conftest import COMING, DEFAULT, HTML, REFERENCE
from unmask.accounts import Accounts, people
from unmask.catalogue import shipped_records, votes
from unmask.catalogue.store import add_measurements, put_fields
from unmask.charts.scatter import Scatter, scatters
from unmask.storage.database import now_ms
from unmask.web import website
from unmask.web.catalogue import quality_charts

T = TypeVar("T")

# Largest size, in bytes, of a page with 500 models in the catalogue.
MAX_BYTES = {
    "/": 20_000,
    "/models": 105_000,
    "/models?q=llama&sort=mteb": 110_000,
    "/models?page=10": 105_000,
    f"/models/{DEFAULT}": 35_000,
    f"/models/{COMING}": 40_000,
    f"/compare?models={DEFAULT},{REFERENCE},{COMING}": 80_000,
    "/docs": 20_000,
    "/status": 8_000,
    "/feed.xml": 30_000,
    f"/models/{COMING}.json": 45_000,
    f"/models/{COMING}.md": 8_000,
}
# Bytes for each model on the pages that list all of them.
MAX_BYTES_PER_MODEL = {"/llms.txt": 300, "/sitemap.xml": 150}
# SQL statements of a page for a visitor who is signed in. One of them reads the session.
MAX_STATEMENTS = {
    **dict.fromkeys([*MAX_BYTES, *MAX_BYTES_PER_MODEL], 1),
    **dict.fromkeys([f"/models/{DEFAULT}", f"/models/{COMING}"], 3),  # with the count of votes and the visitor's own
    "/models?sort=votes": 2,
}


def test_size_with_500_models(start: Callable[..., LocalService]) -> None:
    service = start(large_catalogue(500))
    limits = MAX_BYTES | {path: 500 * size for path, size in MAX_BYTES_PER_MODEL.items()}
    too_large = {}
    for path, limit in limits.items():
        reply = service.call("GET", path, headers=HTML)
        assert reply.status == 200, path
        if len(reply.body) > limit:
            too_large[path] = len(reply.body)
    assert not too_large


def test_charts_of_the_list_are_laid_out_once(
    start: Callable[..., LocalService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placing the labels takes longer than all other work for the list, so layouts are cached."""
    layouts = 0

    def counted(*args: Any, **options: Any) -> list[Scatter]:
        nonlocal layouts
        layouts += 1
        return scatters(*args, **options)

    monkeypatch.setattr(quality_charts, "scatters", counted)
    service = start(large_catalogue(321))  # no other test has the points of this catalogue in the cache
    for path in ("/models", "/models", "/models?page=3"):
        assert service.call("GET", path, headers=HTML).status == 200
    assert 1 <= layouts <= 2  # one for each chart


@contextmanager
def counted_statements(accounts: Accounts) -> Iterator[list[str]]:
    """Collect the SQL statements that pages execute by `Accounts.read`."""
    statements: list[str] = []
    read = accounts.read

    def collect(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    async def reading(query: Callable[[Connection], T]) -> T:
        def watched(connection: Connection) -> T:
            event.listen(connection, "before_cursor_execute", collect)
            return query(connection)

        return await read(watched)

    accounts.read = reading  # pyright: ignore[reportAttributeAccessIssue]
    yield statements
    accounts.read = read


@pytest.mark.parametrize("number", [20, 500])
def test_sql_statements_do_not_grow_with_the_catalogue(tiny_llama: Path, tmp_path: Path, number: int) -> None:
    """The operator's records are in the database of a server that follows it, with accounts and votes."""
    accounts = Accounts(f"sqlite:///{tmp_path / 'accounts.sqlite'}", pepper=tmp_path / "pepper")
    now = 1_800_000_000_000
    with accounts.database.begin() as connection:
        person = people.sign_up(connection, accounts.peppers, "ada@example.org", "no password fits", now)
        session = people.create_session(connection, person.id, now_ms())
        for entry in large_catalogue(number).entries():
            record = entry.record
            if record.id not in shipped_records():
                fields = msgspec.to_builtins(record)
                put_fields(connection, record.id, {k: v for k, v in fields.items() if k not in ("id", "history")})
                add_measurements(connection, entry.measurements)
                votes.vote(connection, person.account_id, record.id, "for a test", now)
    too_many = {}
    with running(tiny_llama, accounts, website, api_keys=(), warm=()) as service, counted_statements(accounts) as sql:
        headers = {**HTML, "cookie": f"unmask_session={session}"}
        service.call("GET", "/", headers=headers, key=None)  # reads the prices, which are then cached
        for path, limit in MAX_STATEMENTS.items():
            del sql[:]
            assert service.call("GET", path, headers=headers, key=None).status == 200, path
            statements = [statement for statement in sql if "FROM prices" not in statement]  # read every five seconds
            if len(statements) > limit:
                too_many[path] = statements
    accounts.close()
    assert not too_many


@pytest.mark.parametrize("id", list(shipped_records()))
def test_a_models_page_is_small(service: LocalService, id: str) -> None:
    page = service.call("GET", f"/models/{id}", headers=HTML).body
    assert len(page) < 100_000
    needed = re.findall(rb'(?:<script[^>]* src|<link rel="stylesheet" href)="([^"]+)"', page)
    assert len(needed) <= 2
    extra = sum(len(service.call("GET", path.decode()).body) for path in needed)
    assert len(page) + extra < 100_000  # with the style and the script that it needs
