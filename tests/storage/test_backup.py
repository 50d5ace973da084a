"""A backup is one moment, whole, and readable by either database."""

import gzip
from pathlib import Path

import pytest

from tests.accounts.postgres import Cluster
from unmask.accounts import keys, ledger, people, tariff, usage
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.ledger import Hold
from unmask.accounts.verification import discrepancies, verify
from unmask.errors import StorageError
from unmask.storage.backup import backup, restore
from unmask.storage.database import Database

NOW = 1_700_000_000_000


@pytest.fixture
def filled(database: Database, peppers: Peppers) -> tuple[str, str]:
    """An account in the database, and a key to it."""
    with database.begin() as connection:
        person = people.sign_up(connection, peppers, "ada@example.org", "hash", NOW, free_credit=1000)
        key = keys.create(connection, peppers, person.account_id, KeySettings(name="Ünïcode"), NOW)
        tariff.set_price(connection, tariff.TariffPrice("m", "default", 5), NOW)
        tariff.set_plan(connection, tariff.RatePlan("small", 5, None))
        people.create_session(connection, person.id, NOW)
        for id in ("c1", "c2"):
            hold = Hold(
                id=id, account_id=person.account_id, key_id=keys.key_id(key), request="r", model="m", tier="default",
                tokens=1, amount=5, expires_at=NOW, idempotency_key=id, body="b",
            )  # fmt: skip
            ledger.hold(connection, hold, NOW)
        ledger.settle(connection, "c1", NOW)
    return person.account_id, key


@pytest.mark.parametrize("into", ["sqlite", "postgresql"])
def test_all_of_it_comes_back_in_either_database(
    database: Database, peppers: Peppers, filled: tuple[str, str], into: str, tmp_path: Path, postgres: Cluster
):
    account, key = filled
    rows = backup(database, tmp_path / "backup.gz")
    assert (tmp_path / "backup.gz").stat().st_mode & 0o077 == 0
    other = Database(postgres.empty() if into == "postgresql" else str(tmp_path / "other.sqlite"))
    assert restore(other, tmp_path / "backup.gz", check=discrepancies) == rows
    with other.begin() as connection:
        assert verify(connection).drift == ()
        assert people.account(connection, account) == people.Account(
            account, "ada@example.org", "default", "active", 995, 5, NOW
        )
        assert keys.authenticate(connection, peppers, key, "", NOW).key.settings.name == "Ünïcode"
        # What comes next gets the next number.
        assert ledger.settle(connection, "c2", NOW)
        numbers = [line.number for line in usage.statement(connection, account)]
        assert numbers == sorted(set(numbers), reverse=True) and len(numbers) == 3
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0
    other.close()


def test_only_into_an_empty_database(database: Database, filled: tuple[str, str], tmp_path: Path):
    backup(database, tmp_path / "backup.gz")
    with pytest.raises(StorageError, match="restore into an empty database"):
        restore(database, tmp_path / "backup.gz", check=discrepancies)


@pytest.mark.parametrize("damage", ["cut", "fewer lines", "other rows", "no gzip", "missing", "newer", "forged"])
def test_a_damaged_backup_restores_nothing(database: Database, filled: tuple[str, str], tmp_path: Path, damage: str):
    file = tmp_path / "backup.gz"
    backup(database, file)
    lines = gzip.decompress(file.read_bytes()).decode().splitlines(keepends=True)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "no gzip":
        file.write_text("".join(lines))
    elif damage == "missing":
        file.unlink()
    else:
        changed = {
            "fewer lines": lines[:-1],
            "other rows": [lines[0], *lines[2:]],
            "newer": [lines[0].replace('"0010"', '"9999"'), *lines[1:]],
            "forged": [line.replace('"active", 995,', '"active", 999995,') for line in lines],
        }[damage]
        assert changed != lines
        file.write_bytes(gzip.compress("".join(changed).encode()))
    other = Database(str(tmp_path / "other.sqlite"))
    with pytest.raises(StorageError):
        restore(other, file, check=discrepancies)
    with other.read() as connection:
        assert people.all_accounts(connection) == []
    other.close()


def test_a_backup_with_other_bytes_is_not_whole(sqlite: Database, tmp_path: Path):
    for number in range(50):
        with sqlite.begin() as connection:
            people.open_account(connection, f"number {number}", NOW)
    file = tmp_path / "backup.gz"
    backup(sqlite, file)
    whole, lines = file.read_bytes(), gzip.decompress(file.read_bytes()).decode().splitlines(keepends=True)
    damaged = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(100, len(whole) - 8, 97)]
    forms = ["[]\n", *lines[1:]], [lines[0], "5\n", *lines[1:]], [lines[0], "[]\n"], [lines[0], "[[1]]\n"]
    damaged += [gzip.compress("".join(form).encode()) for form in forms]
    other = Database(str(tmp_path / "other.sqlite"))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(StorageError):
            restore(other, file, check=discrepancies)
    with other.read() as connection:
        assert people.all_accounts(connection) == []
    other.close()
