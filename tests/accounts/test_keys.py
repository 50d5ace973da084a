"""API keys: their form, their storage, and the reasons for which they are refused."""

import hmac
import os
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unmask.accounts import keys, people
from unmask.accounts.keys import KeySettings, Peppers
from unmask.errors import Forbidden, KeyRefused, StorageError, UsageError
from unmask.storage.database import Database
from unmask.storage.schema import keys as table

NOW = 1_700_000_000_000
DAY = 24 * 3600 * 1000


@pytest.fixture
def account(database: Database) -> str:
    with database.begin() as connection:
        return people.open_account(connection, "somebody", NOW)


def make(database: Database, peppers: Peppers, account: str, **settings) -> str:
    with database.begin() as connection:
        return keys.create(connection, peppers, account, KeySettings(**settings), NOW)


def caller_of(database: Database, peppers: Peppers, key: str, address: str = "", now: int = NOW) -> keys.Caller:
    with database.read() as connection:
        return keys.authenticate(connection, peppers, key, address, now)


def test_a_key_opens_its_account(database: Database, peppers: Peppers, account: str):
    key = make(database, peppers, account, name="laptop")
    caller = caller_of(database, peppers, key)
    assert (caller.account_id, caller.key.id, caller.key.settings.name) == (account, keys.key_id(key), "laptop")


def test_neither_the_key_nor_its_secret_is_stored(database: Database, peppers: Peppers, account: str):
    key = make(database, peppers, account)
    with database.read() as connection:
        row = connection.execute(table.select()).mappings().one()
    stored = " ".join(str(value) for value in row.values())
    assert key not in stored and key.rsplit("_", 1)[1][:43] not in stored
    assert peppers.path.read_text().split()[1] not in stored
    assert peppers.path.stat().st_mode & 0o077 == 0


def test_keys_are_long_and_never_twice_the_same(database: Database, peppers: Peppers, account: str):
    made = {make(database, peppers, account) for _ in range(20)}
    assert len(made) == 20
    assert {len(key) for key in made} == {3 + 12 + 1 + 43 + 6}


@pytest.mark.parametrize("position", [0, 4, 15, 30, 60, 64])
def test_a_mistyped_key_is_told_without_the_database(database: Database, peppers: Peppers, account: str, position: int):
    key = make(database, peppers, account)
    typo = key[:position] + ("x" if key[position] != "x" else "y") + key[position + 1 :]
    database.close()
    with pytest.raises(KeyRefused, match="check that it is whole"):
        keys.authenticate(None, peppers, typo, "", NOW)  # pyright: ignore[reportArgumentType] - it must not be used


def test_an_unknown_id_takes_the_same_work_and_gets_the_same_words(
    database: Database, peppers: Peppers, account: str, monkeypatch: pytest.MonkeyPatch
):
    def forged(body: str) -> str:
        return body + keys._checksum(body)

    real = make(database, peppers, account)
    secret = "0" * 43
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    words = set()
    for key in (forged(f"um_{keys.key_id(real)}_{secret}"), forged(f"um_{'0' * 12}_{secret}")):
        with pytest.raises(KeyRefused) as refused:
            caller_of(database, peppers, key)
        words.add(str(refused.value))
    assert len(words) == 1
    assert compared == [(64, 64), (64, 64)]


def test_the_pepper_is_needed(database: Database, peppers: Peppers, account: str, tmp_path: Path):
    key = make(database, peppers, account)
    with pytest.raises(KeyRefused, match="no key of this id and secret: check that it was made here"):
        caller_of(database, Peppers(tmp_path / "another"), key)


def test_a_new_pepper_leaves_old_keys_working(database: Database, peppers: Peppers, account: str):
    old = make(database, peppers, account)
    mark = peppers.permanent_digest("x")
    peppers.path.write_text(peppers.path.read_text() + "2 " + "ab" * 32 + "\n")
    both = Peppers(peppers.path)
    assert both.current == "2" and both.permanent_digest("x") == mark
    new = make(database, both, account)
    for key in (old, new):
        assert caller_of(database, both, key).account_id == account


@pytest.mark.parametrize("content", ["", "1\n", "1 xyz\n", "1 ab 2\n"])
def test_a_spoilt_pepper_file_is_said(tmp_path: Path, content: str):
    (tmp_path / "pepper").write_text(content)
    with pytest.raises(StorageError, match="pepper"):
        Peppers(tmp_path / "pepper")


@pytest.mark.parametrize(
    ("address", "networks", "good"),
    [
        ("203.0.113.9", ("203.0.113.0/24",), True),
        ("203.0.114.9", ("203.0.113.0/24",), False),
        ("::ffff:203.0.113.9", ("203.0.113.9",), True),
        ("2001:db8::1", ("2001:db8::/32", "10.0.0.1"), True),
        ("", ("0.0.0.0/0",), False),
        ("nonsense", ("0.0.0.0/0",), False),
        ("10.0.0.1", (), False),
    ],
)
def test_networks(database: Database, peppers: Peppers, account: str, address: str, networks: tuple, good: bool):
    key = make(database, peppers, account, networks=networks)
    if good:
        caller_of(database, peppers, key, address)
    else:
        with pytest.raises(Forbidden, match="may not be used from"):
            caller_of(database, peppers, key, address)


def test_expiry_revocation_and_rotation(database: Database, peppers: Peppers, account: str):
    key = make(database, peppers, account, expires_at=NOW + 10, models=("m",))
    caller_of(database, peppers, key, now=NOW + 9)
    with pytest.raises(KeyRefused, match="expired"):
        caller_of(database, peppers, key, now=NOW + 10)
    key = make(database, peppers, account, models=("m",))
    with database.begin() as connection:
        new = keys.rotate(connection, peppers, account, keys.key_id(key), NOW, overlap_ms=1000)
    assert caller_of(database, peppers, new).key.settings.models == ("m",)
    caller_of(database, peppers, key, now=NOW + 999)
    with pytest.raises(KeyRefused, match="expired"):
        caller_of(database, peppers, key, now=NOW + 1000)
    with database.begin() as connection:
        assert keys.revoke(connection, account, keys.key_id(new), NOW)
        assert not keys.revoke(connection, account, keys.key_id(new), NOW)
    with pytest.raises(KeyRefused, match="revoked"):
        caller_of(database, peppers, new)
    with pytest.raises(KeyRefused), database.begin() as connection:
        keys.rotate(connection, peppers, account, keys.key_id(new), NOW)


def test_last_use_only_moves_forward(database: Database, peppers: Peppers, account: str):
    id = keys.key_id(make(database, peppers, account))
    for at in (NOW + 5, NOW + 3):
        with database.begin() as connection:
            keys.record_uses(connection, {id: at, "unknown": at})
    with database.read() as connection:
        assert keys.list_keys(connection, account, NOW)[0].used_at == NOW + 5


@pytest.mark.parametrize(
    "settings",
    [
        {"scopes": ()},
        {"scopes": ("all",)},
        {"spend_window": "year", "spend_limit": 1},
        {"spend_window": "day"},
        {"spend_limit": -1},
        {"requests_per_minute": 0},
        {"networks": ("example.org",)},
        {"name": "x" * 101},
    ],
)
def test_impossible_settings(settings: dict):
    with pytest.raises(UsageError):
        KeySettings(**settings)


def test_what_a_key_is_for(database: Database, peppers: Peppers, account: str):
    caller = caller_of(database, peppers, make(database, peppers, account, scopes=("embeddings",), models=("m",)))
    caller.require("embeddings", "m")
    for scope, model in (("account", None), ("embeddings", "other")):
        with pytest.raises(Forbidden):
            caller.require(scope, model)


@pytest.mark.parametrize("has_links", [True, False])
def test_pepper_files_made_at_the_same_moment_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool):
    barrier, random = threading.Barrier(2, timeout=60), secrets.token_hex

    def draw_together(size: int) -> str:
        barrier.wait()  # neither has found a file, and both have a pepper
        return random(size)

    def refuse(*paths: object) -> None:
        raise PermissionError(1, "no hard links on this disk")

    monkeypatch.setattr(secrets, "token_hex", draw_together)
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "new" / "pepper"
    with ThreadPoolExecutor(2) as pool:
        made = [*pool.map(lambda _: Peppers(path), range(2)), Peppers(path)]
    assert len({peppers.digest("key") for peppers in made}) == 1
    assert [file.name for file in path.parent.iterdir()] == ["pepper"]
    assert path.stat().st_mode & 0o077 == 0


def test_an_account_makes_so_many_keys_a_day(
    database: Database, peppers: Peppers, account: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keys, "_MAX_KEYS_PER_DAY", 5)

    def make_and_revoke(now: int) -> None:
        with database.begin() as connection:
            id = keys.key_id(keys.create(connection, peppers, account, KeySettings(), now))
            keys.revoke(connection, account, id, now)

    for number in range(5):
        make_and_revoke(NOW + number)
    with pytest.raises(Forbidden, match="the next one may be made at 2023-11-15 22:13:20 UTC"):
        make_and_revoke(NOW + 5)
    with database.begin() as connection:
        other = people.open_account(connection, "other", NOW)
        keys.create(connection, peppers, other, KeySettings(), NOW + 5)
    make_and_revoke(NOW + DAY)
    with pytest.raises(Forbidden):
        make_and_revoke(NOW + DAY)
    make_and_revoke(NOW + DAY + 1)


def test_a_list_has_all_living_keys_and_the_latest_revoked_ones(
    database: Database, peppers: Peppers, account: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keys, "_MAX_LISTED_REVOKED", 3)
    with database.begin() as connection:
        ids = [
            keys.key_id(keys.create(connection, peppers, account, KeySettings(), NOW + number)) for number in range(8)
        ]
        for number, id in enumerate(ids[2:]):
            keys.revoke(connection, account, id, NOW + DAY - number)  # the newest keys were revoked first
        listed = [key.id for key in keys.list_keys(connection, account, NOW + DAY)]
        assert listed == [*reversed(ids[:5])]
        assert keys.get(connection, account, ids[7], NOW + DAY).revoked_at is not None
