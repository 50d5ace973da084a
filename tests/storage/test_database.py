"""Tables, migrations and transactions, on both databases."""

import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from tests.accounts.holds import small_hold
from tests.accounts.postgres import Cluster
from unmask.accounts import idempotency, keys, ledger, people, usage
from unmask.accounts.keys import Peppers
from unmask.accounts.verification import verify
from unmask.errors import ReplayLimitReached, StorageError, UsageError
from unmask.storage.database import Database, RawStatement, is_transient, migration_config
from unmask.storage.schema import APPEND_ONLY, accounts, metadata
from unmask.storage.writer import Writer


def test_the_migrations_leave_what_the_schema_says(database: Database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(database: Database):
    with database.begin() as connection:
        people.open_account(connection, "somebody", 1)
    database.migrate()
    with database.read() as connection:
        assert len(people.all_accounts(connection)) == 1


def test_migrating_from_the_first_version_keeps_what_is_there(empty_url: str):
    from alembic import command

    database = Database(empty_url)
    with database.begin() as connection:
        command.upgrade(migration_config(connection), "0001")
        account = people.open_account(connection, "somebody", 1)
    database.migrate()
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert [row.id for row in people.all_accounts(connection)] == [account]
        assert connection.exec_driver_sql("SELECT number FROM catalogue_version").scalar_one() == 0
    database.close()


def test_a_start_with_the_newest_tables_does_without_alembic(tmp_path: Path):
    sqlite_url = f"sqlite:///{tmp_path / 'new.sqlite'}"
    program = f"""
import sys
from unmask.storage.database import Database
Database({sqlite_url!r}).migrate()
print("alembic" in sys.modules)
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "12"]
    assert [run.stdout.strip() for run in runs] == ["True", "False"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_start_together_migrate_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'new.sqlite'}"
    else:
        postgres: Cluster = request.getfixturevalue("postgres")
        url = postgres.empty()
    program = f"from unmask.storage.database import Database; Database({url!r}).migrate()"
    running = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        complaint = process.communicate(timeout=120)[1]
        assert process.returncode == 0, complaint


def test_tables_of_a_newer_version_are_left_alone(database: Database):
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="newest are 0010"):
        database.migrate()


@pytest.mark.parametrize("table", APPEND_ONLY)
@pytest.mark.parametrize("statement", ["UPDATE {table} SET at = 2", "DELETE FROM {table}"])
def test_what_is_append_only_cannot_be_rewritten(database: Database, table: str, statement: str):
    values = {sa.BigInteger: 1, sa.Boolean: True}
    row = {column.name: values.get(type(column.type), "x") for column in metadata.tables[table].c}
    row |= {"credit": "y"} if table == "entries" else {}
    with database.begin() as connection:
        connection.execute(metadata.tables[table].insert(), row)
    with pytest.raises(StorageError, match="append-only"), database.begin() as connection:
        connection.exec_driver_sql(statement.format(table=table))


def test_a_block_that_raises_leaves_nothing(database: Database):
    with pytest.raises(KeyError), database.begin() as connection:
        people.open_account(connection, "somebody", 1)
        raise KeyError
    with database.read() as connection:
        assert people.all_accounts(connection) == []


def test_the_tables_themselves_refuse_a_balance_below_what_is_held(database: Database):
    with database.begin() as connection:
        id = people.open_account(connection, "somebody", 1)
    with pytest.raises(StorageError, match="covered"), database.begin() as connection:
        connection.execute(accounts.update().where(accounts.c.id == id).values(held=1))


def test_a_failure_says_nothing_of_what_was_written(database: Database):
    with pytest.raises(StorageError) as failure, database.begin() as connection:
        row = {"id": "a", "name": "private name", "plan": "missing", "state": "active", "balance": 0, "held": 0}
        connection.execute(accounts.insert(), row | {"created_at": 1})
    assert "private name" not in str(failure.value)


def test_a_statement_straight_to_the_driver_fails_like_any_other(database: Database):
    spoil = RawStatement("UPDATE accounts SET held = :held WHERE id = :id")
    with database.begin() as connection:
        id = people.open_account(connection, "somebody", 1)
        assert spoil.changed(connection, {"held": 0, "id": id}) == 1
        assert spoil.changed(connection, {"held": 0, "id": "nobody"}) == 0
    with pytest.raises(StorageError, match="covered"), database.begin() as connection:
        spoil.changed(connection, {"held": 1, "id": id})


def test_a_kept_connection_outlives_what_fails_in_it(database: Database):
    writer = database.writer_connection()
    with writer.begin() as connection:
        people.open_account(connection, "first", 1)
    for spoiled in (KeyError, StorageError):
        with pytest.raises(spoiled), writer.begin() as connection:
            people.open_account(connection, "nobody", 1)
            raise spoiled("not so")
        with writer.begin() as connection:
            people.open_account(connection, f"after {spoiled.__name__}", 1)
    writer.close()
    with database.read() as connection:
        names = sorted(account.name for account in people.all_accounts(connection))
        assert names == ["after KeyError", "after StorageError", "first"]


def test_a_writer_whose_connections_were_cut_takes_new_ones(postgres: Cluster):
    database = Database(postgres.database())
    writer = Writer(database)
    for number in range(20):  # each of the threads has a connection now
        writer.submit(lambda connection, name=f"before {number}": people.open_account(connection, name, 1)).result(60)
    with database.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    outcomes = []
    for number in range(20):
        try:
            writer.submit(lambda connection, name=f"after {number}": people.open_account(connection, name, 1)).result(
                30
            )
            outcomes.append(f"after {number}")
        except StorageError:
            outcomes.append(None)
    assert outcomes[-1] is not None and outcomes.count(None) <= 6  # at most one for each thread
    with database.read() as connection:
        names = [account.name for account in people.all_accounts(connection) if account.name.startswith("after")]
    assert sorted(names) == sorted(name for name in outcomes if name)
    writer.close()
    database.close()


def test_readers_see_one_state(database: Database):
    with database.read() as before:
        assert people.all_accounts(before) == []
        with database.begin() as connection:
            people.open_account(connection, "somebody", 1)
        assert people.all_accounts(before) == []


def occupy(writer: Writer) -> tuple[Future[None], threading.Event]:
    """Keep a writer busy until the event is set. On SQLite, the pieces that arrive meanwhile share a transaction."""
    entered, go = threading.Event(), threading.Event()

    def wait(connection: sa.Connection) -> None:
        entered.set()
        go.wait(60)

    first = writer.submit(wait)
    assert entered.wait(60)
    return first, go


def test_one_pieces_fault_is_not_the_others(database: Database):
    writer = Writer(database)
    first, go = occupy(writer)

    def refuse(connection: sa.Connection) -> str:
        people.open_account(connection, "never", 1)
        raise UsageError("no")

    good = [writer.submit(lambda connection, n=n: people.open_account(connection, f"good {n}", 1)) for n in range(5)]
    bad = [writer.submit(refuse) for _ in range(5)]
    more = [writer.submit(lambda connection, n=n: people.open_account(connection, f"more {n}", 1)) for n in range(5)]
    go.set()
    assert first.result(60) is None
    for future in bad:
        with pytest.raises(UsageError, match="no"):
            future.result(60)
    made = {future.result(60) for future in good + more}
    writer.close()
    with database.read() as connection:
        assert {account.id for account in people.all_accounts(connection)} == made
    with pytest.raises(StorageError, match="closed"):
        writer.submit(lambda connection: None)


def test_a_full_database_undoes_no_piece_that_is_reported_as_done(sqlite: Database):
    """SQLite undoes the whole transaction when its file is full, with the pieces before the one at fault."""
    writer = Writer(sqlite)
    first, go = occupy(writer)

    def fill(connection: sa.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
        try:
            connection.exec_driver_sql("UPDATE accounts SET name = ?", ("x" * 100_000,))
        finally:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")

    def open_account(number: int) -> Future[str]:
        return writer.submit(lambda connection: people.open_account(connection, f"number {number}", 1))

    before = [open_account(number) for number in range(3)]
    full = writer.submit(fill)
    after = [open_account(number) for number in range(3, 6)]
    go.set()
    first.result(60)
    with pytest.raises(StorageError, match="database or disk is full"):
        full.result(60)
    made = {future.result(60) for future in before + after}
    writer.close()
    with sqlite.read() as connection:
        assert {account.id for account in people.all_accounts(connection)} == made


def test_a_piece_in_a_batch_fails_with_the_error_of_a_lone_one(sqlite: Database):
    writer = Writer(sqlite)
    first, go = occupy(writer)
    faults = [writer.submit(lambda connection: connection.exec_driver_sql("SELECT no_column")) for _ in range(2)]
    go.set()
    first.result(60)
    for future in faults:
        with pytest.raises(StorageError, match="no_column"):
            future.result(60)
    writer.close()


def test_a_transaction_that_the_database_ended_is_no_success(database: Database):
    """A block may swallow the error that ended its transaction; nothing of it is written then."""
    fault = "ROLLBACK" if database.kind == "sqlite" else "SELECT no_column"
    with pytest.raises(StorageError, match=r"undid the transaction; .* try again"), database.begin() as connection:
        people.open_account(connection, "nobody", 1)
        with suppress(DBAPIError):
            connection.exec_driver_sql(fault)
    with database.read() as connection:
        assert people.all_accounts(connection) == []
    with database.begin() as connection:
        people.open_account(connection, "somebody", 1)


def test_a_writer_waits_for_another_process(tmp_path: Path):
    file = str(tmp_path / "accounts.sqlite")
    one, other = Database(file), Database(file)
    one.migrate()
    writer = Writer(other)
    with one.begin() as connection:
        people.open_account(connection, "one", 1)
        future = writer.submit(lambda connection: people.open_account(connection, "other", 1))
        with pytest.raises(TimeoutError):
            future.result(0.2)
    assert future.result(60)
    writer.close()
    one.close()
    other.close()


def test_a_deadlock_is_tried_again(postgres: Cluster):
    database = Database(postgres.database())
    with database.begin() as connection:
        ids = [people.open_account(connection, name, 1) for name in ("a", "b")]
    writer = Writer(database)
    barrier = threading.Barrier(2, timeout=60)
    tries = []

    def cross(first: str, second: str, connection: sa.Connection) -> None:
        tries.append(first)
        connection.execute(accounts.update().where(accounts.c.id == first).values(name="x"))
        if len(tries) <= 2:
            barrier.wait()
        connection.execute(accounts.update().where(accounts.c.id == second).values(name="y"))

    futures = [
        writer.submit(lambda connection: cross(ids[0], ids[1], connection)),
        writer.submit(lambda connection: cross(ids[1], ids[0], connection)),
    ]
    for future in futures:
        future.result(60)
    assert len(tries) == 3
    writer.close()
    database.close()


def test_only_some_failures_are_worth_another_try():
    assert not is_transient(ValueError())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://localhost/x", "'mysql' are not supported"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("://", "cannot be read"),
    ],
)
def test_a_wrong_url_is_said(url: str, message: str):
    with pytest.raises(UsageError, match=message):
        Database(url)


def test_a_password_in_the_url_is_not_shown():
    database = Database("postgresql://me:secret@127.0.0.1:1/none")
    with pytest.raises(StorageError) as failure:
        database.migrate()
    assert "secret" not in str(failure.value) + database.display_url
    database.close()


def test_the_file_is_its_owners(tmp_path: Path):
    Database(f"sqlite:///{tmp_path}/deep/accounts.sqlite").close()
    assert (tmp_path / "deep" / "accounts.sqlite").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        Database(str(tmp_path / "file" / "accounts.sqlite"))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_tables_of_every_version_become_todays_with_all_that_is_in_them(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    def empty(number: int) -> Database:
        if kind == "sqlite":
            return Database(f"sqlite:///{tmp_path / f'{number}.sqlite'}")
        postgres: Cluster = request.getfixturevalue("postgres")
        return Database(postgres.empty())

    first = empty(0)
    with first.read() as connection:
        scripts = ScriptDirectory.from_config(migration_config(connection))
    first.close()
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert "0001" in revisions
    for number, revision in enumerate(revisions, 1):
        database = empty(number)
        with database.begin() as connection:
            command.upgrade(migration_config(connection), revision)
            id = people.open_account(connection, "somebody", 1)
            ledger.top_up(connection, id, 1000, "payment", 2)
            new_hold = small_hold(id)
            ledger.hold(connection, new_hold, 3)
            ledger.settle(connection, "chg_1", 4)
        database.migrate()
        with database.read() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            assert people.account(connection, id).balance == 976
            assert [line.amount for line in usage.statement(connection, id)] == [-24, 1000]
            verification = verify(connection)
            assert verification.drift == () and verification.settled == 24
        database.close()


def test_an_idempotency_key_of_an_older_version_is_remembered(empty_url: str):
    database = Database(empty_url)
    with database.begin() as connection:
        command.upgrade(migration_config(connection), "0007")
        id = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, id, 1000, "payment", 2)
        new_hold = small_hold(id)
        ledger.hold(connection, new_hold, 3)
        ledger.settle(connection, "chg_1", 4)
        connection.execute(
            sa.text("INSERT INTO replays VALUES (:account, 'k', 'body', 'chg_1', 1000)"), {"account": id}
        )
    database.migrate()
    again = replace(new_hold, id="chg_2", idempotency_key="k", body="body")
    with database.begin() as connection:
        for _ in range(idempotency.MAX_REPLAYS):
            assert ledger.hold(connection, again, 5) == ledger.HeldCredit("chg_1", 24, replayed=True)
        with pytest.raises(ReplayLimitReached):
            ledger.hold(connection, again, 5)
    database.close()


def test_refunds_of_an_older_version_leave_the_spend_of_their_keys(empty_url: str, peppers: Peppers):
    database = Database(empty_url)
    with database.begin() as connection:
        command.upgrade(migration_config(connection), "0008")
        id = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, id, 1000, "payment", 2)
        settings = keys.KeySettings(spend_limit=100)
        old = keys.key_id(keys.create(connection, peppers, id, settings, 2))
        new = keys.key_id(keys.rotate(connection, peppers, id, old, 2))
        other = keys.key_id(keys.create(connection, peppers, id, settings, 2))
        for number, key in enumerate((old, new, new, other)):
            new_hold = ledger.Hold(
                id=f"chg_{number}",
                account_id=id,
                key_id=key,
                request="r",
                model="m",
                tier="default",
                tokens=3,
                amount=24,
                expires_at=10,
            )
            ledger.hold(connection, new_hold, 3)
            ledger.settle(connection, new_hold.id, 4)
        # A refund as older versions booked it.
        for number in (0, 1):
            connection.execute(
                sa.text(
                    "INSERT INTO entries (at, kind, debit, credit, amount, reference, note) "
                    "VALUES (5, 'refund', '@revenue', :account, 24, :charge, '')"
                ),
                {"account": id, "charge": f"chg_{number}"},
            )
        connection.execute(accounts.update().values(balance=accounts.c.balance + 48))
    database.migrate()
    with database.read() as connection:
        assert [keys.get(connection, id, key, 6).spent for key in (old, new, other)] == [24, 24, 24]
        assert verify(connection).drift == ()
    database.close()


def test_what_needs_no_waiting_is_written_inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unmask.storage.database._BUSY_SECONDS", 3600)  # longer than a test may take
    database = Database(f"sqlite:///{tmp_path / 'accounts.sqlite'}")
    database.migrate()
    writer = Writer(database, flushed=False)
    try:
        made = writer.try_inline(lambda connection: people.open_account(connection, "somebody", 1))
        assert made is not None
        with database.read() as connection:
            assert [account.id for account in people.all_accounts(connection)] == [made.result()]

        def spoil(connection: sa.Connection) -> None:
            people.open_account(connection, "nobody", 1)
            raise UsageError("not so")

        failed = writer.try_inline(spoil)
        assert failed is not None
        with pytest.raises(UsageError, match="not so"):
            failed.result()
        # While another process writes, nothing is waited for in this thread: the piece is for the writer's.
        with database.begin() as connection:
            connection.execute(accounts.update().values(name="changed"))
            assert writer.try_inline(lambda connection: people.open_account(connection, "third", 1)) is None
            waiting = writer.submit(lambda connection: people.open_account(connection, "third", 1))
        waiting.result(60)
        with database.read() as connection:
            assert sorted(account.name for account in people.all_accounts(connection)) == ["changed", "third"]
    finally:
        writer.close()
        database.close()


def test_a_charge_that_must_be_on_the_disk_is_not_written_in_the_event_loops_thread(database: Database):
    writer = Writer(database, flushed=True)
    try:
        assert writer.try_inline(lambda connection: None) is None
    finally:
        writer.close()


def test_the_log_is_copied_into_the_file(tmp_path: Path):
    file = tmp_path / "accounts.sqlite"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    with database.begin() as connection:
        for number in range(200):
            people.open_account(connection, f"account {number} " + "x" * 150, 1)
    before = file.stat().st_size
    database.checkpoint_wal()
    assert file.stat().st_size > before
    database.close()
