"""The service: work that nobody waits for is repeated where it must be done, and logged where it is not."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from tests.accounts.holds import small_hold
from tests.api.live import until
from unmask.accounts import Accounts, BillableRequest, costs, keys, ledger, people, tariff
from unmask.accounts import accounts as accounts_module
from unmask.accounts.costs import AttemptRecord
from unmask.accounts.keys import Caller, KeySettings
from unmask.accounts.verification import verify
from unmask.errors import SpendLimitReached, StorageError
from unmask.storage.database import Database, now_ms
from unmask.storage.schema import provider_attempts

PRICE = 8_000_000  # eight nano-dollars per token

_RAISE = {
    "sqlite": [
        "CREATE TRIGGER full_disk BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the disk is full'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION full_disk()",
    ],
}


def do(accounts: Accounts, piece: Callable[[Connection], Any]) -> Any:
    with accounts.database.begin() as connection:
        return piece(connection)


def refuse_rows(database: Database, table: str) -> None:
    """Let the database itself refuse new rows of a table, as it does without space on the disk."""
    with database.begin() as connection:
        for statement in _RAISE[database.kind]:
            connection.exec_driver_sql(statement.format(table=table))


def take_rows(database: Database, table: str) -> None:
    """End `refuse_rows`."""
    with database.begin() as connection:
        connection.exec_driver_sql(f"DROP TRIGGER full_disk{'' if database.kind == 'sqlite' else f' ON {table}'}")


@pytest.fixture
def caller(accounts: Accounts) -> Caller:
    """A customer with 1,000 nano-dollars, of a server that sells the model `m`."""

    def make(connection: Connection) -> str:
        id = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, id, 1000, "payment", 1)
        tariff.set_price(connection, tariff.TariffPrice("m", "default", PRICE), 1)
        return keys.create(connection, accounts.peppers, id, KeySettings(), 1)

    secret = do(accounts, make)
    return run(accounts.authenticate(secret, "127.0.0.1"))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def balance(accounts: Accounts, caller: Caller) -> int:
    with accounts.database.read() as connection:
        assert verify(connection).drift == ()
        return people.account(connection, caller.account_id).balance


async def charged(accounts: Accounts, caller: Caller) -> str:
    """Charge ten tokens, and return the charge."""
    work = BillableRequest(request="r", model="m", tier="default", tokens=10, seconds=60)
    held = await accounts.hold(caller, work)
    await accounts.settle(held.id)
    return held.id


@pytest.fixture(autouse=True)
def no_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep only where a test does it."""
    monkeypatch.setattr(accounts_module, "_SWEEP_S", 1e9)


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_a_refund_that_fails_once_is_repeated(accounts: Accounts, caller: Caller, caplog: pytest.LogCaptureFixture):
    charge = run(charged(accounts, caller))
    assert balance(accounts, caller) == 920
    refuse_rows(accounts.database, "entries")
    accounts.give_back(charge)
    until(lambda: bool(messages(caplog)))
    (message,) = messages(caplog)
    assert charge in message and "is tried again" in message
    accounts.sweep()
    assert balance(accounts, caller) == 920 and messages(caplog) == [message]
    take_rows(accounts.database, "entries")
    until(lambda: bool(accounts.sweep() or balance(accounts, caller) == 1000))
    accounts.sweep()
    assert balance(accounts, caller) == 1000 and messages(caplog) == [message]


def test_a_withheld_answer_leaves_the_spend_limit(accounts: Accounts, caller: Caller):
    limited = KeySettings(spend_limit=80)
    do(accounts, lambda c: keys.change(c, caller.account_id, caller.key.id, limited, now_ms()))
    charge = run(charged(accounts, caller))
    with pytest.raises(SpendLimitReached):
        run(charged(accounts, caller))
    accounts.give_back(charge)
    until(lambda: balance(accounts, caller) == 1000)
    run(charged(accounts, caller))
    assert balance(accounts, caller) == 920


def test_a_refund_that_fails_for_good_is_logged(
    accounts: Accounts, caller: Caller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(accounts_module, "_REFUND_TRIES", 3)
    charge = run(charged(accounts, caller))
    refuse_rows(accounts.database, "entries")
    accounts.give_back(charge)
    until(lambda: bool(accounts.sweep() or messages(caplog, logging.ERROR)))
    (message,) = messages(caplog, logging.ERROR)
    assert f"unmask accounts refund {charge}" in message
    take_rows(accounts.database, "entries")
    accounts.sweep()
    assert balance(accounts, caller) == 920


def test_a_refund_that_the_ledger_refuses_is_not_repeated(
    accounts: Accounts, caller: Caller, caplog: pytest.LogCaptureFixture
):
    held = run(accounts.hold(caller, BillableRequest(request="r", model="m", tier="default", tokens=10, seconds=60)))
    accounts.give_back(held.id)
    until(lambda: bool(messages(caplog, logging.ERROR)))
    accounts.sweep()
    (message,) = messages(caplog)
    assert f"charge {held.id} is held: only a settled charge can be refunded" in message


def test_a_server_that_stops_says_what_it_did_not_refund(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    accounts = Accounts(url, pepper=tmp_path / "pepper")
    accounts.give_back("chg_unknown")
    accounts._failed_refunds["chg_1"] = 1

    def make(connection: Connection) -> None:
        id = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, id, 1000, "payment", 1)
        ledger.hold(
            connection,
            small_hold(id),
            3,
        )
        ledger.settle(connection, "chg_1", 4)

    do(accounts, make)
    refuse_rows(accounts.database, "entries")
    accounts.close()
    assert any("unmask accounts refund chg_1" in message for message in messages(caplog, logging.ERROR))


def test_attempts_that_are_not_written_are_logged(accounts: Accounts, caplog: pytest.LogCaptureFixture):
    attempt = AttemptRecord(
        at=now_ms(),
        provider="acme",
        model="m",
        milliseconds=3,
        outcome="failed",
        reason="answer",
        tokens=7,
        their_tokens=None,
        price=PRICE,
    )
    refuse_rows(accounts.database, "provider_attempts")
    accounts.record_attempts([attempt, attempt])
    until(lambda: bool(messages(caplog)))
    (message,) = messages(caplog)
    assert "2 attempts at providers are not in the books" in message and "INSERT" not in message


def test_a_sweep_forgets_old_attempts_that_cost_nothing(accounts: Accounts) -> None:
    old = AttemptRecord(
        at=1,
        provider="a",
        model="m",
        milliseconds=3,
        outcome="unreachable",
        reason="answer",
        tokens=7,
        their_tokens=None,
        price=PRICE,
    )
    do(accounts, lambda c: costs.add_attempts(c, [old, replace(old, at=now_ms()), replace(old, outcome="failed")]))
    accounts.sweep()
    rows = do(accounts, lambda c: c.execute(sa.select(provider_attempts.c.outcome)).scalars().all())
    assert sorted(rows) == ["failed", "unreachable"]


def test_a_release_that_fails_is_logged(
    accounts: Accounts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def lost(*arguments: object) -> bool:
        raise StorageError("the connection was cut")

    monkeypatch.setattr(ledger, "release", lost)
    accounts.release("chg_1")
    until(lambda: bool(messages(caplog)))
    assert "chg_1 stays held" in messages(caplog)[0] and "the connection was cut" in messages(caplog)[0]
