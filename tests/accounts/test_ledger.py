"""The ledger: the effect of each booking, its refusals, and that repeating it changes nothing."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts import idempotency, keys, ledger, people
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.ledger import HeldCredit, Hold
from unmask.accounts.money import MAX_AMOUNT
from unmask.accounts.verification import verify
from unmask.errors import (
    Forbidden,
    InsufficientCredit,
    KeyRefused,
    KeyReused,
    LedgerRefused,
    ReplayLimitReached,
    RequestInProgress,
    SpendLimitReached,
    UsageError,
)
from unmask.storage.database import Database
from unmask.storage.schema import accounts, charges, entries
from unmask.storage.schema import keys as key_table
from unmask.storage.writer import Writer

DAY = 24 * 3600 * 1000
NOON = 20_000 * DAY + DAY // 2


def new_hold(account: str, id: str, amount: int, **more: Any) -> Hold:
    values: dict[str, Any] = {
        "id": id,
        "account_id": account,
        "key_id": None,
        "request": "req",
        "model": "m",
        "tier": "default",
        "tokens": amount,
        "amount": amount,
        "expires_at": NOON + 1000,
    }
    return Hold(**values | more)


def balance(database: Database, account: str) -> tuple[int, int]:
    """Return balance and held amount, after verifying the books."""
    with database.read() as connection:
        assert verify(connection).drift == ()
        row = people.account(connection, account)
    return row.balance, row.held


@pytest.fixture
def account(database: Database) -> str:
    """An account with a thousand nano-dollars."""
    with database.begin() as connection:
        id = people.open_account(connection, "somebody", NOON)
        assert ledger.top_up(connection, id, 1000, "payment 1", NOON)
    return id


def test_a_request_that_works(database: Database, account: str):
    with database.begin() as connection:
        assert ledger.hold(connection, new_hold(account, "c1", 300), NOON) == HeldCredit("c1", 300)
    assert balance(database, account) == (1000, 300)
    with database.begin() as connection:
        assert ledger.settle(connection, "c1", NOON)
    assert balance(database, account) == (700, 0)


def test_a_settlement_happens_once(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
    done = []
    for _ in range(3):
        with database.begin() as connection:
            done.append(ledger.settle(connection, "c1", NOON))
    assert done == [True, False, False]
    with database.begin() as connection:
        assert not ledger.release(connection, "c1", NOON)
    assert balance(database, account) == (700, 0)


def test_a_request_that_fails(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
        assert ledger.release(connection, "c1", NOON)
        assert not ledger.release(connection, "c1", NOON)
    assert balance(database, account) == (1000, 0)
    with pytest.raises(LedgerRefused, match="released"), database.begin() as connection:
        ledger.settle(connection, "c1", NOON)


def test_a_request_that_is_free(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 0), NOON)
        assert ledger.settle(connection, "c1", NOON)
        assert not ledger.refund(connection, "c1", NOON)
    assert balance(database, account) == (1000, 0)


def test_more_than_there_is(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 600), NOON)
    with (
        pytest.raises(InsufficientCredit, match=r"costs 0\.000000401 .* has 0\.0000004 "),
        database.begin() as connection,
    ):
        ledger.hold(connection, new_hold(account, "c2", 401), NOON)
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c2", 400), NOON)
    assert balance(database, account) == (1000, 1000)


def test_a_dead_servers_hold_is_given_back(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
        assert ledger.expired_holds(connection, NOON + 999) == []
        assert ledger.expired_holds(connection, NOON + 1000) == ["c1"]
        assert ledger.expire(connection, "c1", NOON + 1000)
    assert balance(database, account) == (1000, 0)


def test_work_that_was_done_after_its_hold_expired_is_charged(database: Database, account: str):
    for id, left in (("c1", 700), ("c2", 400)):
        with database.begin() as connection:
            ledger.hold(connection, new_hold(account, id, 300), NOON)
            ledger.expire(connection, id, NOON + 1000)
            assert ledger.settle(connection, id, NOON + 1001)
        assert balance(database, account) == (left, 0)
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c3", 300), NOON)
        ledger.expire(connection, "c3", NOON + 1000)
        ledger.hold(connection, new_hold(account, "c4", 400), NOON)
    with pytest.raises(InsufficientCredit, match="expired"), database.begin() as connection:
        ledger.settle(connection, "c3", NOON + 1001)
    assert balance(database, account) == (400, 400)


def test_a_top_up_happens_once_per_reference(database: Database, account: str):
    with database.begin() as connection:
        assert not ledger.top_up(connection, account, 1000, "payment 1", NOON)
        assert ledger.top_up(connection, account, 1000, "payment 2", NOON)
        other = people.open_account(connection, "other", NOON)
    assert balance(database, account) == (2000, 0)
    for id, amount in ((account, 999), (other, 1000)):
        said = f"'payment 1' stands for 0.000001 dollars to {account}"
        with pytest.raises(LedgerRefused, match=said), database.begin() as connection:
            ledger.top_up(connection, id, amount, "payment 1", NOON)


@pytest.mark.parametrize("amount", [0, -1, MAX_AMOUNT + 1, MAX_AMOUNT])
def test_a_top_up_that_is_impossible(database: Database, account: str, amount: int):
    with pytest.raises(LedgerRefused), database.begin() as connection:
        ledger.top_up(connection, account, amount, "payment 3", NOON)
    assert balance(database, account) == (1000, 0)


def test_a_top_up_needs_a_reference_and_an_account(database: Database, account: str):
    for id, reference in ((account, ""), ("acct_none", "payment 3")):
        with pytest.raises(LedgerRefused), database.begin() as connection:
            ledger.top_up(connection, id, 1, reference, NOON)
    assert balance(database, account) == (1000, 0)


def test_a_refund_happens_once(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
    with pytest.raises(LedgerRefused, match="held"), database.begin() as connection:
        ledger.refund(connection, "c1", NOON)
    with database.begin() as connection:
        ledger.settle(connection, "c1", NOON)
        assert ledger.refund(connection, "c1", NOON)
        assert not ledger.refund(connection, "c1", NOON)
    assert balance(database, account) == (1000, 0)
    with pytest.raises(LedgerRefused, match="not known"), database.begin() as connection:
        ledger.refund(connection, "c2", NOON)


def test_money_paid_out_must_be_free(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
        ledger.pay_out(connection, account, 700, "back 1", NOON)
    assert balance(database, account) == (300, 300)
    with pytest.raises(LedgerRefused, match="free credit"), database.begin() as connection:
        ledger.pay_out(connection, account, 1, "back 2", NOON)
    with database.begin() as connection:
        ledger.release(connection, "c1", NOON)
    with pytest.raises(LedgerRefused, match="used already"), database.begin() as connection:
        ledger.pay_out(connection, account, 1, "back 1", NOON)
    assert balance(database, account) == (300, 0)


def test_a_frozen_account_finishes_but_begins_nothing(database: Database, account: str):
    with database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c1", 300), NOON)
        assert people.set_frozen(connection, account, frozen=True)
        assert not people.set_frozen(connection, account, frozen=True)
    with pytest.raises(Forbidden, match="frozen"), database.begin() as connection:
        ledger.hold(connection, new_hold(account, "c2", 1), NOON)
    with database.begin() as connection:
        assert ledger.settle(connection, "c1", NOON)
        assert people.set_frozen(connection, account, frozen=False)
        ledger.hold(connection, new_hold(account, "c2", 1), NOON)
    assert balance(database, account) == (700, 1)


@pytest.mark.parametrize("threads", [50])
def test_many_threads_spend_one_small_balance(database: Database, account: str, threads: int):
    """Accepted cost never exceeds the balance, through the writer that the server uses."""
    writer = Writer(database)
    accepted: Counter[str] = Counter()
    lock = threading.Lock()
    start = threading.Barrier(threads)

    def spend(thread: int) -> None:
        start.wait()
        for number in range(4):
            id = f"c{thread}-{number}"
            try:
                held = writer.submit(lambda c, id=id: ledger.hold(c, new_hold(account, id, 17), NOON)).result()
            except InsufficientCredit:
                continue
            if number % 3 == 2:
                writer.submit(lambda c, id=id: ledger.release(c, id, NOON)).result()
            else:
                writer.submit(lambda c, id=id: ledger.settle(c, id, NOON)).result()
                with lock:
                    accepted["cost"] += held.amount

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(spend, range(threads)))
    writer.close()
    assert balance(database, account) == (1000 - accepted["cost"], 0)
    # 200 tries of 17 for 1000: whatever was released in between, nothing that still fits is left.
    assert 1000 - accepted["cost"] < 17 * threads and accepted["cost"] <= 1000


def test_many_threads_without_the_door(database: Database, account: str):
    """The statement itself is safe, not only the thread that runs it."""
    start = threading.Barrier(10)

    def spend(thread: int) -> int:
        start.wait()
        taken = 0
        for number in range(10):
            try:
                with database.begin() as connection:
                    ledger.hold(connection, new_hold(account, f"c{thread}-{number}", 30), NOON)
                    ledger.settle(connection, f"c{thread}-{number}", NOON)
                taken += 30
            except InsufficientCredit:
                pass
        return taken

    with ThreadPoolExecutor(10) as pool:
        taken = sum(pool.map(spend, range(10)))
    assert taken == 990
    assert balance(database, account) == (10, 0)


def test_one_charge_is_ended_once_by_whoever_comes_first(database: Database, account: str):
    writer = Writer(database)
    for number in range(20):
        id = f"c{number}"
        writer.submit(lambda c, id=id: ledger.hold(c, new_hold(account, id, 10), NOON)).result()
        ends = [
            writer.submit(lambda c, id=id: ledger.settle(c, id, NOON)),
            writer.submit(lambda c, id=id: ledger.settle(c, id, NOON)),
            writer.submit(lambda c, id=id: ledger.release(c, id, NOON)),
        ]
        outcomes = [future.exception() or future.result() for future in ends]
        assert sum(outcome is True for outcome in outcomes) == 1
    writer.close()
    balance(database, account)


def test_a_reference_has_a_length(database: Database, account: str):
    long = "".join(chr(0x4E00 + number % 20_000) for number in range(20_000))
    steps = (
        lambda c, reference: ledger.top_up(c, account, 1, reference, NOON),
        lambda c, reference: ledger.pay_out(c, account, 1, reference, NOON),
        lambda c, reference: ledger.pay_provider(c, "p", 1, reference, NOON),
    )
    for step in steps:
        with pytest.raises(UsageError, match="20000 characters: at most 200"), database.begin() as connection:
            step(connection, long)
        with database.begin() as connection:
            step(connection, long[:200])


class TestKeys:
    """Spend limits of keys."""

    @staticmethod
    def key(database: Database, peppers: Peppers, account: str, **settings: Any) -> str:
        with database.begin() as connection:
            made = keys.create(connection, peppers, account, KeySettings(**settings), NOON)
        return keys.key_id(made)

    @staticmethod
    def spend(connection: Connection, account: str, key: str, id: str, amount: int, now: int, **more: Any) -> None:
        ledger.hold(connection, new_hold(account, id, amount, key_id=key, **more), now)

    def test_a_limit_for_good(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100)
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON)
        with pytest.raises(SpendLimitReached, match="does not start anew"), database.begin() as connection:
            self.spend(connection, account, key, "c2", 41, NOON + 400 * DAY)
        assert balance(database, account) == (1000, 60)
        with database.begin() as connection:
            ledger.release(connection, "c1", NOON)
            self.spend(connection, account, key, "c2", 100, NOON)
            ledger.settle(connection, "c2", NOON)
        assert balance(database, account) == (900, 0)

    def test_a_refund_returns_the_spend_limit_too(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100)
        with database.begin() as connection:
            new = keys.key_id(keys.rotate(connection, peppers, account, key, NOON))
            self.spend(connection, account, new, "c1", 100, NOON)
            ledger.settle(connection, "c1", NOON)
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, key, "c2", 1, NOON)
        for done in (True, False):  # a second refund returns nothing
            with database.begin() as connection:
                assert ledger.refund(connection, "c1", NOON) == done
                assert keys.get(connection, account, key, NOON).spent == 0
        assert balance(database, account) == (1000, 0)
        with database.begin() as connection:
            self.spend(connection, account, key, "c2", 100, NOON)
        assert balance(database, account) == (1000, 100)

    def test_a_refund_of_yesterday_returns_nothing_to_today(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100, spend_window="day")
        day = {"spend_window": "day"}
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON, **day)
            ledger.settle(connection, "c1", NOON)
            self.spend(connection, account, key, "c2", 90, NOON + DAY, **day)
            ledger.settle(connection, "c2", NOON + DAY)
            assert ledger.refund(connection, "c1", NOON + DAY)
            assert keys.get(connection, account, key, NOON + DAY).spent == 90
        assert balance(database, account) == (910, 0)
        with database.begin() as connection:
            keys.change(connection, account, key, KeySettings(spend_limit=100), NOON + DAY + 1)
            assert ledger.refund(connection, "c2", NOON + DAY + 2)
            assert keys.get(connection, account, key, NOON + DAY + 2).spent == 0
        assert balance(database, account) == (1000, 0)

    def test_a_limit_per_day(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100, spend_window="day")
        day = {"spend_window": "day"}
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON, **day)
        with pytest.raises(SpendLimitReached, match="next day"), database.begin() as connection:
            self.spend(connection, account, key, "c2", 41, NOON + DAY // 2 - 1, **day)
        with database.begin() as connection:
            self.spend(connection, account, key, "c2", 90, NOON + DAY // 2, **day)
            # Yesterday's charge gives nothing back to today.
            ledger.release(connection, "c1", NOON + DAY // 2)
        assert balance(database, account) == (1000, 90)
        # A request that crossed midnight on its way does not bring yesterday back.
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, key, "c3", 11, NOON, **day)
        with database.begin() as connection:
            self.spend(connection, account, key, "c3", 10, NOON, **day)
            ledger.settle(connection, "c3", NOON)
        assert balance(database, account) == (990, 90)

    def test_an_expired_hold_and_its_late_settlement(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100)
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON)
            ledger.expire(connection, "c1", NOON)
        assert balance(database, account) == (1000, 0)
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
        assert balance(database, account) == (940, 0)
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, key, "c2", 41, NOON)

    def test_another_window_starts_at_nothing(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100, spend_window="day")
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON, spend_window="day")
            keys.change(connection, account, key, KeySettings(spend_limit=100, spend_window="month"), NOON + 1)
            self.spend(connection, account, key, "c2", 100, NOON + 2, spend_window="month")
            ledger.release(connection, "c1", NOON + 3)
        assert balance(database, account) == (1000, 100)
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, key, "c3", 1, NOON + 3, spend_window="month")

    def test_a_rotated_key_goes_on_counting(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account, spend_limit=100)
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON)
            new = keys.key_id(keys.rotate(connection, peppers, account, key, NOON))
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, new, "c2", 41, NOON)
        with database.begin() as connection:
            self.spend(connection, account, new, "c2", 40, NOON)
        assert balance(database, account) == (1000, 100)

    def test_keys_of_one_rotation_share_one_limit(self, database: Database, peppers: Peppers, account: str):
        first = self.key(database, peppers, account, spend_limit=100, spend_window="day")
        day = {"spend_window": "day"}
        with database.begin() as connection:
            second, third = (keys.key_id(keys.rotate(connection, peppers, account, first, NOON)) for _ in "ab")
            fourth = keys.key_id(keys.rotate(connection, peppers, account, second, NOON))
        family = [first, second, third, fourth]
        for number, key in enumerate(family):
            with database.begin() as connection:
                self.spend(connection, account, key, f"c{number}", 25, NOON, **day)
        for key in family:
            with pytest.raises(SpendLimitReached), database.begin() as connection:
                self.spend(connection, account, key, "over", 1, NOON, **day)
        with database.begin() as connection:
            assert [keys.get(connection, account, key, NOON).spent for key in family] == [100] * 4
            ledger.release(connection, "c3", NOON)
            ledger.settle(connection, "c0", NOON)
            keys.revoke(connection, account, first, NOON)
            self.spend(connection, account, second, "c4", 25, NOON, **day)
            assert {key.spent for key in keys.list_keys(connection, account, NOON)} == {100}
        with pytest.raises(KeyRefused), database.begin() as connection:
            self.spend(connection, account, first, "c5", 0, NOON, **day)
        with database.begin() as connection:
            assert verify(connection).drift == ()
            self.spend(connection, account, third, "c5", 100, NOON + DAY, **day)
            assert verify(connection).drift == ()

    def test_changing_the_limit_of_a_rotated_key(self, database: Database, peppers: Peppers, account: str):
        old = self.key(database, peppers, account, spend_limit=100)
        with database.begin() as connection:
            new = keys.key_id(keys.rotate(connection, peppers, account, old, NOON))
            self.spend(connection, account, old, "c1", 100, NOON)
            keys.change(connection, account, new, KeySettings(name="new", spend_limit=150), NOON)
            self.spend(connection, account, old, "c2", 50, NOON)
            assert keys.get(connection, account, old, NOON).settings.name == ""
        with pytest.raises(SpendLimitReached), database.begin() as connection:
            self.spend(connection, account, new, "c3", 1, NOON)
        with database.begin() as connection:
            keys.change(connection, account, new, KeySettings(spend_limit=150, spend_window="day"), NOON + 1)
            for key, id in ((old, "c3"), (new, "c4")):
                self.spend(connection, account, key, id, 75, NOON + 2, spend_window="day")
            assert verify(connection).drift == ()
        for key in (old, new):
            with pytest.raises(SpendLimitReached), database.begin() as connection:
                self.spend(connection, account, key, "c5", 1, NOON + 2, spend_window="day")

    def test_old_and_new_key_at_once(self, database: Database, peppers: Peppers, account: str):
        old = self.key(database, peppers, account, spend_limit=600)
        with database.begin() as connection:
            new = keys.key_id(keys.rotate(connection, peppers, account, old, NOON))
        start = threading.Barrier(8)

        def spend(thread: int) -> int:
            start.wait()
            taken = 0
            for number in range(10):
                id = f"c{thread}-{number}"
                try:
                    with database.begin() as connection:
                        self.spend(connection, account, (old, new)[thread % 2], id, 20, NOON)
                    taken += 20
                except SpendLimitReached:
                    pass
            return taken

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(spend, range(8))) == 600
        with database.begin() as connection:
            assert verify(connection).drift == ()

    def test_a_revoked_key_begins_nothing(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account)
        with database.begin() as connection:
            self.spend(connection, account, key, "c1", 60, NOON)
            keys.revoke(connection, account, key, NOON)
        with pytest.raises(KeyRefused), database.begin() as connection:
            self.spend(connection, account, key, "c2", 1, NOON)
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
        assert balance(database, account) == (940, 0)

    def test_another_accounts_key_pays_nothing(self, database: Database, peppers: Peppers, account: str):
        key = self.key(database, peppers, account)
        with database.begin() as connection:
            other = people.open_account(connection, "other", NOON)
            ledger.top_up(connection, other, 1000, "payment 2", NOON)
        with pytest.raises(KeyRefused), database.begin() as connection:
            self.spend(connection, other, key, "c1", 1, NOON)
        assert balance(database, other) == (1000, 0)


class TestReplays:
    """Idempotency-Keys."""

    @staticmethod
    def hold(database: Database, account: str, id: str, now: int = NOON, body: str = "body") -> HeldCredit:
        with database.begin() as connection:
            return ledger.hold(connection, new_hold(account, id, 100, idempotency_key="k", body=body), now)

    def test_what_was_charged_is_not_charged_again(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
        assert self.hold(database, account, "c2", NOON + DAY - 1) == HeldCredit("c1", 100, replayed=True)
        assert balance(database, account) == (900, 0)
        with pytest.raises(KeyReused):
            self.hold(database, account, "c2", body="another")
        assert self.hold(database, account, "c2", NOON + DAY) == HeldCredit("c2", 100)

    def test_one_charge_is_replayed_a_few_times(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
        for _ in range(idempotency.MAX_REPLAYS):
            assert self.hold(database, account, "c2").replayed
        for _ in range(2):
            with pytest.raises(ReplayLimitReached, match="repeated 5 times"):
                self.hold(database, account, "c2")
        with database.begin() as connection:
            ledger.refund(connection, "c1", NOON)
        # Another charge has replays of its own.
        assert self.hold(database, account, "c2") == HeldCredit("c2", 100)
        with database.begin() as connection:
            ledger.settle(connection, "c2", NOON)
        for _ in range(idempotency.MAX_REPLAYS):
            assert self.hold(database, account, "c3") == HeldCredit("c2", 100, replayed=True)
        with pytest.raises(ReplayLimitReached):
            self.hold(database, account, "c3")
        assert self.hold(database, account, "c3", NOON + DAY) == HeldCredit("c3", 100)

    def test_many_replays_at_once_stay_within_the_bound(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
        start = threading.Barrier(8)

        def attempt(number: int) -> int:
            start.wait()
            answered = 0
            for _ in range(3):
                with suppress(ReplayLimitReached):
                    answered += self.hold(database, account, f"c2-{number}").replayed
            return answered

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) == idempotency.MAX_REPLAYS
        assert balance(database, account) == (900, 0)

    def test_while_the_first_is_worked_on(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with pytest.raises(RequestInProgress):
            self.hold(database, account, "c2")
        assert balance(database, account) == (1000, 100)

    @pytest.mark.parametrize("end", [ledger.release, ledger.expire])
    def test_after_the_first_failed(self, database: Database, account: str, end: Any):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            end(connection, "c1", NOON)
        assert self.hold(database, account, "c2") == HeldCredit("c2", 100)

    def test_after_a_refund_it_is_charged_anew(self, database: Database, account: str):
        """It would be answered for nothing otherwise, by providers who are paid for it."""
        self.hold(database, account, "c1")
        with database.begin() as connection:
            ledger.settle(connection, "c1", NOON)
            ledger.refund(connection, "c1", NOON)
        assert self.hold(database, account, "c2") == HeldCredit("c2", 100)
        assert balance(database, account) == (1000, 100)
        with pytest.raises(RequestInProgress):
            self.hold(database, account, "c3")
        with database.begin() as connection:
            ledger.settle(connection, "c2", NOON)
        assert self.hold(database, account, "c3") == HeldCredit("c2", 100, replayed=True)
        with pytest.raises(KeyReused):
            self.hold(database, account, "c3", body="another")

    def test_another_account_has_keys_of_its_own(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            other = people.open_account(connection, "other", NOON)
            ledger.top_up(connection, other, 1000, "payment 2", NOON)
        assert self.hold(database, other, "c2", body="another") == HeldCredit("c2", 100)

    def test_only_one_of_many_at_once(self, database: Database, account: str):
        start = threading.Barrier(8)

        def attempt(number: int) -> bool:
            start.wait()
            try:
                self.hold(database, account, f"c{number}")
            except RequestInProgress:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) == 1
        assert balance(database, account) == (1000, 100)

    def test_old_ones_are_forgotten(self, database: Database, account: str):
        self.hold(database, account, "c1")
        with database.begin() as connection:
            assert idempotency.forget_replays(connection, NOON + DAY - 1) == 0
            assert idempotency.forget_replays(connection, NOON + DAY) == 1


class TestVerification:
    """`verify` reports every kind of damage that the rules above prevent."""

    @pytest.fixture
    def spoilt(self, database: Database, peppers: Peppers, account: str):
        """`spoilt(statement)` runs a statement on sound tables, and returns what `verify` reports then."""
        key = TestKeys.key(database, peppers, account)
        with database.begin() as connection:
            for id, amount in (("c1", 100), ("c2", 50), ("c3", 10)):
                ledger.hold(connection, new_hold(account, id, amount, key_id=key), NOON)
            ledger.settle(connection, "c1", NOON)
            ledger.release(connection, "c2", NOON)
            ledger.refund(connection, "c1", NOON)

        def run(statement: sa.Executable, *more: sa.Executable) -> set[str]:
            with database.begin() as connection:
                for one in (statement, *more):
                    connection.execute(one)
                return {drift.what for drift in verify(connection).drift}

        return run

    def test_a_balance(self, spoilt: Any):
        assert spoilt(accounts.update().values(balance=accounts.c.balance + 1)) == {"balance"}

    def test_a_hold(self, spoilt: Any):
        assert spoilt(accounts.update().values(held=accounts.c.held + 1)) == {"held"}

    def test_a_settled_charge_without_its_entry(self, spoilt: Any):
        drift = spoilt(charges.update().where(charges.c.id == "c2").values(state="settled"))
        assert "entry of a charge that is settled" in drift

    def test_an_entry_of_a_charge_that_was_not_settled(self, spoilt: Any, account: str):
        row = {"at": 1, "kind": "charge", "debit": account, "credit": "@revenue", "amount": 50, "note": ""}
        for reference, what in (("c2", "entry of a charge that is released"), ("c9", "does not exist")):
            assert any(what in drift for drift in spoilt(entries.insert().values(row | {"reference": reference})))

    def test_a_keys_count(self, spoilt: Any):
        assert spoilt(key_table.update().values(spent=key_table.c.spent + 1)) == {"spent in the key's window"}

    def test_a_refund_of_what_was_not_charged(self, spoilt: Any, account: str):
        row = {"at": 1, "kind": "refund", "debit": "@revenue", "credit": account, "amount": 50, "note": ""}
        assert "refund" in spoilt(entries.insert().values(row | {"reference": "c2"}))

    def test_entries_of_nobody(self, spoilt: Any):
        row = {"at": 1, "kind": "top_up", "debit": "@cash", "credit": "acct_none", "amount": 5, "note": ""}
        drift = spoilt(entries.insert().values(row | {"reference": "p"}))
        assert drift == {"entries of an account that does not exist"}
