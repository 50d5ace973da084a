"""No sequence of bookings, crashes and races breaks the books.

Hypothesis invents the sequence, a model in plain Python says what the balances must then be, and after every step
the ledger is recomputed from its entries. A crash is an exception before a statement of its choice: whatever the
booking wrote until then must be gone. A race is several bookings in threads of their own, started together; which
of them win is the database's affair, and the model only follows what they report.
"""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, event

from tests.accounts.holds import small_hold
from tests.accounts.postgres import Cluster
from unmask.accounts import costs, keys, ledger, people
from unmask.accounts.costs import AttemptRecord
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.ledger import Hold
from unmask.accounts.verification import verify
from unmask.errors import AccountError, Forbidden, InsufficientCredit, LedgerRefused, SpendLimitReached
from unmask.storage.database import Database, RawStatement

DAY = 24 * 3600 * 1000
KEY_LIMIT = 600

Piece = Callable[[Connection], Any]


class Crash(Exception):
    """The process is gone before this statement."""


@contextmanager
def gone_before(connection: Connection, statement: int) -> Iterator[None]:
    """A crash before the statement of this number, from 0, whether it goes by SQLAlchemy or straight to the driver."""
    left = itertools.count(statement, -1)
    straight = RawStatement._run

    def gone(*_: Any) -> None:
        if next(left) == 0:
            raise Crash

    def counted(self: RawStatement, connection: Connection, values: Mapping[str, Any], *, rows: bool) -> Any:
        gone()
        return straight(self, connection, values, rows=rows)

    event.listen(connection, "before_cursor_execute", gone)
    try:
        with mock.patch.object(RawStatement, "_run", counted):
            yield
    finally:
        event.remove(connection, "before_cursor_execute", gone)


@dataclass
class Charge:
    account: str
    amount: int
    state: str
    expires_at: int


@dataclass
class Model:
    """Expected state of the books."""

    balance: dict[str, int] = field(default_factory=dict)
    key: dict[str, str | None] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    charges: dict[str, Charge] = field(default_factory=dict)
    top_ups: dict[str, tuple[str, int]] = field(default_factory=dict)
    refunded: set[str] = field(default_factory=set)
    costs: dict[str, int] = field(default_factory=dict)  # by provider, of all attempts
    paid: dict[str, int] = field(default_factory=dict)

    def add_costs(self, attempts: Sequence[AttemptRecord]) -> None:
        for attempt in attempts:
            self.costs[attempt.provider] = self.costs.get(attempt.provider, 0) + attempt.cost

    def held(self, account: str) -> int:
        return sum(c.amount for c in self.charges.values() if c.account == account and c.state == "held")

    def free(self, account: str) -> int:
        return self.balance[account] - self.held(account)


amounts = st.integers(1, 400)
providers = st.sampled_from(["acme", "gpu-2"])


def attempt_at(provider: str, outcome: str, reason: costs.Reason, tokens: int, theirs: int | None) -> AttemptRecord:
    return AttemptRecord(
        at=1,
        provider=provider,
        model="m",
        milliseconds=3,
        outcome=outcome,
        reason=reason,
        tokens=tokens,
        their_tokens=theirs,
        price=1_234_567,
    )


failed_attempts = st.lists(
    st.builds(
        attempt_at,
        providers,
        st.sampled_from(["failed", "timeout", "cancelled", "unreachable", "rate_limited", "discarded"]),
        st.sampled_from(["answer", "retry", "hedge", "probe"]),
        st.integers(1, 5000),
        st.none() | st.integers(0, 9000),
    ),
    max_size=2,
)


class Books(RuleBasedStateMachine):
    """State machine of hypothesis over the ledger. A subclass makes the databases: a new one for each sequence."""

    accounts = Bundle("accounts")
    charges = Bundle("charges")

    def __init__(self) -> None:
        super().__init__()
        self.database, self.peppers = self.open_database()
        self.model = Model()
        self.now = 20_000 * DAY
        self.numbers = itertools.count()

    @staticmethod
    def open_database() -> tuple[Database, Peppers]:
        raise NotImplementedError

    def teardown(self) -> None:
        self.database.close()

    def do(self, piece: Piece) -> Any:
        with self.database.begin() as connection:
            return piece(connection)

    # --- single bookings, whose outcome the model knows beforehand

    @initialize(target=accounts, limited=st.booleans())
    def first_account(self, limited: bool) -> str:
        return self.opened(limited)

    @rule(target=accounts, limited=st.booleans())
    def open_account(self, limited: bool) -> str:
        return self.opened(limited)

    def opened(self, limited: bool) -> str:
        id = self.do(lambda c: people.open_account(c, "somebody", self.now))
        self.model.balance[id] = 0
        self.model.key[id] = None
        if limited:
            limit = KeySettings(spend_limit=KEY_LIMIT, spend_window="day")
            self.model.key[id] = keys.key_id(self.do(lambda c: keys.create(c, self.peppers, id, limit, self.now)))
        return id

    @rule(account=accounts, amount=amounts, number=st.integers(0, 30))
    def top_up(self, account: str, amount: int, number: int) -> None:
        reference = f"payment {number}"
        earlier = self.model.top_ups.get(reference)
        try:
            done = self.do(lambda c: ledger.top_up(c, account, amount, reference, self.now))
        except LedgerRefused:
            assert earlier is not None and earlier != (account, amount)
            return
        assert done == (earlier is None)
        if done:
            self.model.top_ups[reference] = (account, amount)
            self.model.balance[account] += amount

    @rule(target=charges, account=accounts, amount=st.integers(0, 400), lives=st.integers(1, 5))
    def hold(self, account: str, amount: int, lives: int) -> str:
        new_hold = self.new_hold(account, amount, lives)
        try:
            self.do(lambda c: ledger.hold(c, new_hold, self.now))
        except Forbidden:
            assert account in self.model.frozen
        except InsufficientCredit:
            assert account not in self.model.frozen and self.model.free(account) < amount
        except SpendLimitReached:
            assert self.model.key[account] is not None
        else:
            assert account not in self.model.frozen and self.model.free(account) >= amount
            self.model.charges[new_hold.id] = Charge(account, amount, "held", new_hold.expires_at)
        return new_hold.id

    @rule(charge=charges)
    def settle(self, charge: str) -> None:
        booked = self.model.charges.get(charge)
        late = booked is not None and booked.state == "expired"
        free = self.model.free(booked.account) if booked else 0
        try:
            done = self.do(lambda c: ledger.settle(c, charge, self.now))
        except InsufficientCredit:
            assert booked is not None and late and free < booked.amount
            return
        except LedgerRefused:
            assert booked is None or booked.state == "released"
            return
        assert booked is not None and done == (booked.state in ("held", "expired"))
        if done:
            assert not late or free >= booked.amount
            self.model.balance[booked.account] -= booked.amount
            booked.state = "settled"

    @rule(charge=charges, provider=providers, failed=failed_attempts, tokens=st.integers(1, 5000))
    def settle_what_a_provider_answered(
        self, charge: str, provider: str, failed: list[AttemptRecord], tokens: int
    ) -> None:
        booked = self.model.charges.get(charge)
        free = self.model.free(booked.account) if booked else 0
        attempts = [*failed, attempt_at(provider, "answered", "answer", tokens, tokens + 1)]
        try:
            done = self.do(lambda c: costs.settle_with_attempts(c, charge, self.now, provider, attempts))
        except InsufficientCredit:
            assert booked is not None and booked.state == "expired" and free < booked.amount
            return
        except LedgerRefused:
            assert booked is None or booked.state == "released"
            return
        assert booked is not None and done == (booked.state in ("held", "expired"))
        if done:
            self.model.balance[booked.account] -= booked.amount
            booked.state = "settled"
            self.model.add_costs(attempts)

    @rule(attempts=failed_attempts)
    def nobody_answers(self, attempts: list[AttemptRecord]) -> None:
        self.do(lambda c: costs.add_attempts(c, attempts))
        self.model.add_costs(attempts)

    @rule()
    def the_costs_are_booked(self) -> None:
        while self.do(lambda c: costs.book_costs(c, self.now)):
            pass
        with self.database.read() as connection:
            owed = {name: cost - self.model.paid.get(name, 0) for name, cost in self.model.costs.items() if cost}
            assert costs.payables(connection) == owed

    @rule(provider=providers, number=st.integers(0, 3))
    def an_invoice_is_paid(self, provider: str, number: int) -> None:
        due = self.model.costs.get(provider, 0) - self.model.paid.get(provider, 0)
        if due <= 0:
            return
        self.the_costs_are_booked()
        reference = f"invoice {next(self.numbers)}"
        assert self.do(lambda c: ledger.pay_provider(c, provider, due, reference, self.now))
        assert not self.do(lambda c: ledger.pay_provider(c, provider, due, reference, self.now))
        self.model.paid[provider] = self.model.paid.get(provider, 0) + due

    @rule(charge=charges)
    def release(self, charge: str) -> None:
        booked = self.model.charges.get(charge)
        done = self.do(lambda c: ledger.release(c, charge, self.now))
        assert done == (booked is not None and booked.state == "held")
        if booked is not None and done:
            booked.state = "released"

    @rule(charge=charges)
    def refund(self, charge: str) -> None:
        booked = self.model.charges.get(charge)
        try:
            done = self.do(lambda c: ledger.refund(c, charge, self.now))
        except LedgerRefused:
            assert booked is None or booked.state != "settled"
            return
        assert booked is not None
        assert done == (booked.amount > 0 and charge not in self.model.refunded)
        if done:
            self.model.refunded.add(charge)
            self.model.balance[booked.account] += booked.amount

    @rule(account=accounts, amount=amounts)
    def pay_out(self, account: str, amount: int) -> None:
        try:
            self.do(lambda c: ledger.pay_out(c, account, amount, f"back {next(self.numbers)}", self.now))
        except LedgerRefused:
            assert self.model.free(account) < amount
            return
        assert self.model.free(account) >= amount
        self.model.balance[account] -= amount

    @rule(account=accounts, frozen=st.booleans())
    def freeze(self, account: str, frozen: bool) -> None:
        changed = self.do(lambda c: people.set_frozen(c, account, frozen=frozen))
        assert changed == ((account in self.model.frozen) != frozen)
        (self.model.frozen.add if frozen else self.model.frozen.discard)(account)

    @rule(milliseconds=st.sampled_from([1, 2, 5, DAY // 2, DAY]))
    def time_passes_and_the_sweeper_comes(self, milliseconds: int) -> None:
        self.now += milliseconds
        late = self.do(lambda c: ledger.expired_holds(c, self.now))
        due = {id for id, c in self.model.charges.items() if c.state == "held" and c.expires_at <= self.now}
        assert set(late) == due
        for charge in late:
            assert self.do(lambda c, charge=charge: ledger.expire(c, charge, self.now))
            self.model.charges[charge].state = "expired"

    # --- crashes

    @rule(data=st.data(), account=accounts, charge=charges, statement=st.integers(0, 6))
    def crash(self, data: st.DataObject, account: str, charge: str, statement: int) -> None:
        """Crash before one statement of a booking. No part of the booking may stay."""
        piece = data.draw(self.pieces(account, charge))[1]
        with self.database.begin() as connection:
            before = connection.begin_nested()
            try:
                with gone_before(connection, statement):
                    piece(connection)
            except (Crash, AccountError):
                pass
            before.rollback()
        # And as the process that dies does it: without saying so.
        try:
            with self.database.begin() as connection:
                piece(connection)
                raise Crash
        except (Crash, AccountError):
            pass

    # --- races

    @rule(data=st.data(), account=accounts, charge=charges, number=st.integers(2, 6))
    def race(self, data: st.DataObject, account: str, charge: str, number: int) -> None:
        """Several bookings at once, on one account and one charge so that they meet."""
        drawn = [data.draw(self.pieces(account, charge)) for _ in range(number)]
        start = threading.Barrier(number)

        def run(piece: Piece) -> Any:
            start.wait(30)
            try:
                return self.do(piece)
            except AccountError as refused:
                return refused

        with ThreadPoolExecutor(number) as pool:
            outcomes = list(pool.map(run, [piece for _, piece, _ in drawn]))
        for (_, _, follow), outcome in zip(drawn, outcomes, strict=True):
            if not isinstance(outcome, AccountError) and outcome is not False:
                follow()

    def pieces(self, account: str, charge: str) -> st.SearchStrategy[tuple[str, Piece, Callable[[], None]]]:
        """Bookings by name, each with the change of the model that belongs to it."""
        model, now = self.model, self.now
        new_hold = self.new_hold(account, 100, 3)
        reference = f"race {next(self.numbers)}"
        booked = model.charges.get(charge)

        def held() -> None:
            model.charges[new_hold.id] = Charge(account, 100, "held", new_hold.expires_at)

        def settled() -> None:
            assert booked is not None
            booked.state = "settled"
            model.balance[booked.account] -= booked.amount

        def released() -> None:
            assert booked is not None
            booked.state = "released" if booked.state != "settled" else booked.state

        attempts = [attempt_at("acme", "failed", "answer", 7, None), attempt_at("gpu-2", "answered", "retry", 7, 8)]

        def answered() -> None:
            settled()
            model.add_costs(attempts)

        def refunded() -> None:
            assert booked is not None
            model.refunded.add(charge)
            model.balance[booked.account] += booked.amount

        def add(amount: int) -> Callable[[], None]:
            def change() -> None:
                model.balance[account] += amount

            return change

        return st.sampled_from(
            [
                ("hold", lambda c: ledger.hold(c, new_hold, now), held),
                ("settle", lambda c: ledger.settle(c, charge, now), settled),
                (
                    "answer",
                    lambda c: costs.settle_with_attempts(c, charge, now, "gpu-2", attempts),
                    answered,
                ),
                ("attempts", lambda c: costs.add_attempts(c, attempts[:1]), lambda: model.add_costs(attempts[:1])),
                ("book costs", lambda c: costs.book_costs(c, now), lambda: None),
                ("release", lambda c: ledger.release(c, charge, now), released),
                ("refund", lambda c: ledger.refund(c, charge, now), refunded),
                ("top up", lambda c: ledger.top_up(c, account, 50, reference, now), add(50)),
                ("pay out", lambda c: ledger.pay_out(c, account, 70, reference, now), add(-70)),
            ]
        )

    def new_hold(self, account: str, amount: int, lives: int) -> Hold:
        return Hold(
            id=f"c{next(self.numbers)}",
            account_id=account,
            key_id=self.model.key[account],
            request="r",
            model="m",
            tier="default",
            tokens=amount,
            amount=amount,
            expires_at=self.now + lives,
            spend_window="day",
        )

    # --- always

    @invariant()
    def the_books_are_right(self) -> None:
        with self.database.read() as connection:
            report = verify(connection)
            assert report.drift == () and report.cost == sum(self.model.costs.values())
            for id, balance in self.model.balance.items():
                row = people.account(connection, id)
                assert (row.balance, row.held) == (balance, self.model.held(id))
                assert 0 <= row.held <= row.balance
                for key in keys.list_keys(connection, id, self.now):
                    # A settlement after its hold expired may go above: the work was done.
                    assert key.spent >= 0


def test_a_crash_can_come_before_each_statement(database: Database, peppers: Peppers):
    with database.begin() as connection:
        account = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, account, 1000, "r1", 1)
        key = keys.key_id(keys.create(connection, peppers, account, KeySettings(), 1))

    def statements(piece: Piece) -> int:
        with database.begin() as connection:
            for number in itertools.count():
                before = connection.begin_nested()
                try:
                    with gone_before(connection, number):
                        piece(connection)
                except Crash:
                    before.rollback()
                else:
                    return number
        raise AssertionError

    new_hold = small_hold(account, id="c1", key=key)
    assert statements(lambda connection: ledger.hold(connection, new_hold, 2)) == 3  # credit, limit, charge
    assert statements(lambda connection: ledger.settle(connection, "c1", 3)) == 3  # charge, credit, entry


def run(books: type[Books], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        books,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


def test_on_sqlite(tmp_path: Path):
    template = Database(str(tmp_path / "template.sqlite"))
    template.migrate()
    template.close()
    numbers = itertools.count()
    peppers = Peppers(tmp_path / "pepper")

    class OnSqlite(Books):
        @staticmethod
        def open_database() -> tuple[Database, Peppers]:
            file = tmp_path / f"{next(numbers)}.sqlite"
            shutil.copy(tmp_path / "template.sqlite", file)
            return Database(str(file)), peppers

    run(OnSqlite, 25, 30)


def test_on_postgres(postgres: Cluster, tmp_path: Path):
    peppers = Peppers(tmp_path / "pepper")

    class OnPostgres(Books):
        @staticmethod
        def open_database() -> tuple[Database, Peppers]:
            return Database(postgres.database()), peppers

    run(OnPostgres, 8, 30)
