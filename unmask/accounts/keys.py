"""API keys: their format, storage and permissions.

A key is `um_<public id>_<secret><checksum>`. The id finds the row. Of the secret only an HMAC under a pepper is
stored, and the pepper is outside the database, so neither alone gives access. A fast hash is right for a secret of
256 random bits, which cannot be guessed.
"""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, RowMapping

from unmask.accounts.ledger import window_start
from unmask.disk import create_once
from unmask.errors import Forbidden, KeyRefused, StorageError, UsageError
from unmask.home import home
from unmask.storage.schema import accounts, keys

SCOPES = ("embeddings", "account")  # calling models; reading balance, usage and keys
WINDOWS = ("day", "week", "month")

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID, _SECRET, _CHECK = 12, 43, 6  # 62^43 > 2^256
_SHAPE = re.compile(rf"um_([0-9A-Za-z]{{{_ID}}})_[0-9A-Za-z]{{{_SECRET + _CHECK}}}", re.ASCII)


class Peppers:
    """The secrets for the HMAC of keys, by name. New keys use the last one.

    Args:
        path: file with one `name hex` per line. Created with one pepper if it does not exist.

    Raises:
        StorageError: it cannot be read or written, or is not such a file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home() / "accounts" / "pepper"
        if not self.path.exists():
            # Another process may be doing so: the keys of both must stay good, so both read the one that is there.
            create_once(self.path, f"1 {secrets.token_hex(32)}\n")
        try:
            lines = [line.split() for line in self.path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            self._peppers = {name: bytes.fromhex(value) for name, value in lines}
            self.current = lines[-1][0]
        except (OSError, ValueError, IndexError) as error:
            raise StorageError(
                f"the pepper file {self.path} cannot be used: it needs lines of a name and a hexadecimal number. "
                "Without the right one no API key works; restore it from where you keep its copy"
            ) from error

    def digest(self, key: str, pepper: str | None = None) -> str:
        """Return the HMAC of a key under the named pepper. An unknown name takes as long and fits no key."""
        secret = self._peppers.get(pepper or self.current, b"")
        return hmac.new(secret or b"missing", key.encode(), hashlib.sha256).hexdigest()

    def permanent_digest(self, text: str) -> str:
        """Return a digest of `text` under the first pepper, which stays the same when peppers are added."""
        return hmac.new(next(iter(self._peppers.values())), text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KeySettings:
    """Permissions and limits of a key. None is no limit.

    Attributes:
        scopes: out of `SCOPES`.
        models: ids it may call.
        networks: addresses and CIDR blocks it may come from.
        spend_limit: nano-dollars per `spend_window`, which is day, week, month (UTC) or None for once and for all.
        expires_at: Unix milliseconds.

    Raises:
        UsageError: a value is not possible.
    """

    name: str = ""
    scopes: tuple[str, ...] = SCOPES
    models: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    spend_limit: int | None = None
    spend_window: str | None = None
    expires_at: int | None = None

    def __post_init__(self) -> None:
        if len(self.name) > 100:
            raise UsageError(f"the key's name has {len(self.name)} characters: at most 100")
        if not self.scopes or not set(self.scopes) <= set(SCOPES):
            raise UsageError(f"scopes={','.join(self.scopes) or 'none'}: choose from {', '.join(SCOPES)}")
        if self.spend_window is not None and self.spend_window not in WINDOWS:
            raise UsageError(f"spend window {self.spend_window!r}: choose day, week or month")
        if self.spend_window is not None and self.spend_limit is None:
            raise UsageError("a spend window needs a spend limit")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 10**12:
                raise UsageError(f"{name}={value}: must be greater than 0")
        if self.spend_limit is not None and not 0 <= self.spend_limit <= 10**17:
            raise UsageError(f"spend_limit={self.spend_limit}: must be 0 or more")
        for network in self.networks or ():
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise UsageError(f"network {network!r}: write an address, or a block like 203.0.113.0/24") from None

    def row(self) -> dict[str, Any]:
        """As columns of `keys`."""
        return {
            "name": self.name,
            "scopes": json.dumps(self.scopes),
            "models": None if self.models is None else json.dumps(self.models),
            "networks": None if self.networks is None else json.dumps(self.networks),
            "requests_per_minute": self.requests_per_minute,
            "tokens_per_minute": self.tokens_per_minute,
            "spend_limit": self.spend_limit,
            "spend_window": self.spend_window,
            "expires_at": self.expires_at,
        }


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key without its secret, as its owner sees it."""

    id: str
    account_id: str
    settings: KeySettings
    spent: int
    created_at: int
    revoked_at: int | None
    used_at: int | None

    def state(self, now: int) -> str:
        """Return "active", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.settings.expires_at
        return "expired" if expires_at is not None and expires_at <= now else "active"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The caller of a request: the key, and the limits of its account's plan beside the key's own."""

    account_id: str
    key: Key
    plan_requests_per_minute: int | None
    plan_tokens_per_minute: int | None

    def check(self, address: str, now: int) -> None:
        """Check that the key is active, and may be used from this IP address.

        Raises:
            KeyRefused: it is not active.
            Forbidden: it may not be used from this address.
        """
        state = self.key.state(now)
        if state != "active":
            raise KeyRefused(f"it is {state}")
        networks = self.key.settings.networks
        if networks is not None and not _within(address, networks):
            raise Forbidden(f"This API key may not be used from {address or 'an unknown address'}.")

    def require(self, scope: str, model: str | None = None) -> None:
        """Check that the key has a scope, and may call a model.

        Raises:
            Forbidden: it has not, or may not.
        """
        allowed = self.key.settings
        if scope not in allowed.scopes:
            raise Forbidden(
                f"This API key has no scope '{scope}', only {', '.join(allowed.scopes)}: make a key that has it."
            )
        if model is not None and allowed.models is not None and model not in allowed.models:
            raise Forbidden(f"This API key may not call the model '{model}': add it to the key's models.")


def create(connection: Connection, peppers: Peppers, account: str, settings: KeySettings, now: int) -> str:
    """Create a key and return it whole. It cannot be shown again.

    Raises:
        Forbidden: the account is not active, has too many keys, or made too many within a day.
    """
    _lock(connection, account)
    return _create(connection, peppers, account, settings.row(), now)


def rotate(
    connection: Connection, peppers: Peppers, account: str, id: str, now: int, *, overlap_ms: int = 24 * 3600 * 1000
) -> str:
    """Create a key with the settings of an old one, and return it. The old key works until the overlap ends.

    Both have one limit, and one count of what they spend. So have all keys of several rotations.

    Raises:
        KeyRefused: the account has no such key, or it is revoked.
        Forbidden: as `create`.
    """
    _lock(connection, account)
    row = connection.execute(_own(account, id)).mappings().one_or_none()
    if row is None or row["revoked_at"] is not None:
        raise KeyRefused(f"there is no key {id} to rotate")
    columns = {column: row[column] for column in KeySettings().row()}
    columns["counter_id"] = row["counter_id"] or id
    new = _create(connection, peppers, account, columns, now)
    end = now + overlap_ms
    connection.execute(
        keys.update()
        .where(keys.c.id == id, sa.or_(keys.c.expires_at.is_(None), keys.c.expires_at > end))
        .values(expires_at=end)
    )
    return new


def change(connection: Connection, account: str, id: str, settings: KeySettings, now: int) -> None:
    """Replace a key's settings. If the spend window changes, its spend starts at zero.

    Spend limit and window are changed for all keys that count with it, see `rotate`.

    Raises:
        KeyRefused: the account has no such key, or it is revoked.
    """
    _lock(connection, account)
    row = connection.execute(_own(account, id)).mappings().one_or_none()
    if row is None or row["revoked_at"] is not None:
        raise KeyRefused(f"there is no key {id} to change")
    counter = row["counter_id"] or id
    same = keys.c.spend_window.is_not_distinct_from(settings.spend_window)
    connection.execute(
        keys.update()
        .where(keys.c.account_id == account, sa.or_(keys.c.id == counter, keys.c.counter_id == counter))
        .values(
            spend_limit=settings.spend_limit,
            spend_window=settings.spend_window,
            spent=sa.case((same, keys.c.spent), else_=0),
            carried=sa.case((same, keys.c.carried), else_=0),
            # A moment that no window begins at, so that no charge counts in it yet.
            window_started=sa.case(
                (same, keys.c.window_started), else_=sa.case((keys.c.window_started >= now, now + 1), else_=now)
            ),
        )
    )
    connection.execute(keys.update().where(keys.c.id == id).values(**settings.row()))


def revoke(connection: Connection, account: str, id: str, now: int) -> bool:
    """Revoke a key. Its open charges continue.

    Returns:
        False if it was revoked before.

    Raises:
        KeyRefused: the account has no such key.
    """
    _lock(connection, account)
    done = connection.execute(
        keys.update()
        .where(keys.c.account_id == account, keys.c.id == id, keys.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    if done.rowcount == 1:
        return True
    if connection.execute(_own(account, id)).one_or_none() is None:
        raise KeyRefused(f"there is no key {id} to revoke")
    return False


def list_keys(connection: Connection, account: str, now: int) -> list[Key]:
    """List an account's keys, newest first: all that are not revoked, and of the others those revoked last.

    A single key, also an older one, is read with `get`.
    """
    latest_revoked = (
        sa.select(keys.c.id)
        .where(keys.c.account_id == account, keys.c.revoked_at.is_not(None))
        .order_by(keys.c.revoked_at.desc(), keys.c.id)
        .limit(_MAX_LISTED_REVOKED)
    )
    rows = connection.execute(
        _COUNTED.where(
            keys.c.account_id == account, sa.or_(keys.c.revoked_at.is_(None), keys.c.id.in_(latest_revoked))
        ).order_by(keys.c.created_at.desc(), keys.c.id)
    )
    return [_key(row, now) for row in rows.mappings()]


def get(connection: Connection, account: str, id: str, now: int) -> Key:
    """Return a key of an account.

    Raises:
        KeyRefused: the account has no such key.
    """
    row = connection.execute(_own(account, id)).mappings().one_or_none()
    if row is None:
        raise KeyRefused(f"there is no key {id}")
    return _key(row, now)


def authenticate(connection: Connection, peppers: Peppers, key: str, address: str, now: int) -> Caller:
    """Return the caller that a key belongs to.

    A refusal takes the same time and has the same message whether the id exists or not.

    Raises:
        KeyRefused: it is no key of this server, or is not active.
        Forbidden: the account is frozen, or the key may not be used from this address.
    """
    match = _SHAPE.fullmatch(key)
    # A mistyped or cut key is refused without a query. This reveals nothing: anybody can compute the checksum.
    if match is None or _checksum(key[:-_CHECK]) != key[-_CHECK:]:
        raise KeyRefused("it is not an API key of this server: check that it is whole")
    row = connection.execute(_CALLER, {"id": match[1]}).mappings().one_or_none()
    digest = peppers.digest(key, row["pepper"] if row else None)
    good = hmac.compare_digest(digest, row["digest"] if row else "0" * 64)
    if row is None or not good:
        raise KeyRefused("this server has no key of this id and secret: check that it was made here, or make a new one")
    own = _key(row, now)
    caller = Caller(
        account_id=own.account_id,
        key=own,
        plan_requests_per_minute=row["plan_requests"],
        plan_tokens_per_minute=row["plan_tokens"],
    )
    caller.check(address, now)
    if row["account_state"] != "active":
        raise Forbidden(f"This account is {row['account_state']}: ask the operator of this server.")
    return caller


def record_uses(connection: Connection, uses: Mapping[str, int]) -> None:
    """Store the last use of keys, Unix milliseconds by key id."""
    for id, at in uses.items():
        connection.execute(
            keys.update()
            .where(keys.c.id == id, sa.or_(keys.c.used_at.is_(None), keys.c.used_at < at))
            .values(used_at=at)
        )


_counter = keys.alias("counter")
_COUNTED = sa.select(
    keys, _counter.c.spent.label("counted"), _counter.c.window_started.label("counted_from")
).join_from(keys, _counter, _counter.c.id == sa.func.coalesce(keys.c.counter_id, keys.c.id))

_CALLER = sa.text(
    "SELECT keys.*, counter.spent AS counted, counter.window_started AS counted_from, "
    "accounts.state AS account_state, plans.requests_per_minute AS plan_requests, "
    "plans.tokens_per_minute AS plan_tokens FROM keys "
    "JOIN keys AS counter ON counter.id = COALESCE(keys.counter_id, keys.id) "
    "JOIN accounts ON accounts.id = keys.account_id "
    "JOIN plans ON plans.name = accounts.plan WHERE keys.id = :id"
)

_MAX_KEYS = 1000  # per account: enough for one per machine, and an end to a loop that makes them
_MAX_KEYS_PER_DAY = 200  # per account, revoked ones too: rows of keys stay for ever, since charges name them
_MAX_LISTED_REVOKED = 200
_DAY_MS = 24 * 3600 * 1000


def _create(connection: Connection, peppers: Peppers, account: str, row: Mapping[str, Any], now: int) -> str:
    state = connection.scalar(sa.select(accounts.c.state).where(accounts.c.id == account))
    if state != "active":
        raise Forbidden(f"account {account} is {state or 'not known'}, so it gets no keys")
    number = connection.scalar(
        sa.select(sa.func.count()).where(keys.c.account_id == account, keys.c.revoked_at.is_(None))
    )
    if int(number or 0) >= _MAX_KEYS:
        raise Forbidden(f"account {account} has {_MAX_KEYS} keys, which is the most: revoke some")
    _check_daily_keys(connection, account, now)
    id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID))
    body = f"um_{id}_{_base62(secrets.randbits(256), _SECRET)}"
    key = body + _checksum(body)
    new = {"spent": 0, "carried": 0, "window_started": 0, "counter_id": None, "created_at": now, **row}
    connection.execute(
        keys.insert(),
        {"id": id, "account_id": account, "digest": peppers.digest(key), "pepper": peppers.current, **new},
    )
    return key


def _check_daily_keys(connection: Connection, account: str, now: int) -> None:
    first = connection.scalar(
        sa.select(keys.c.created_at)
        .where(keys.c.account_id == account, keys.c.created_at > now - _DAY_MS)
        .order_by(keys.c.created_at.desc())
        .offset(_MAX_KEYS_PER_DAY - 1)
        .limit(1)
    )
    if first is not None:
        again = datetime.fromtimestamp(-(-(first + _DAY_MS) // 1000), UTC).strftime("%Y-%m-%d %H:%M:%S")
        raise Forbidden(
            f"account {account} made {_MAX_KEYS_PER_DAY} keys within a day, which is the most: the next one may be "
            f"made at {again} UTC"
        )


def key_id(key: str) -> str:
    """Return the public part of a key."""
    return key.split("_")[1]


def _own(account: str, id: str) -> sa.Select[Any]:
    return _COUNTED.where(keys.c.account_id == account, keys.c.id == id)


def _lock(connection: Connection, account: str) -> None:
    """Let no hold of the account begin or end until this transaction does. Each takes the account's row first.

    `ledger.hold` reads which row counts, and whether the key is revoked, without a lock of the key's own row.
    """
    connection.execute(sa.select(accounts.c.id).where(accounts.c.id == account).with_for_update(key_share=True))


def _key(row: RowMapping, now: int) -> Key:
    settings = KeySettings(
        name=row["name"],
        scopes=tuple(json.loads(row["scopes"])),
        models=None if row["models"] is None else tuple(json.loads(row["models"])),
        networks=None if row["networks"] is None else tuple(json.loads(row["networks"])),
        requests_per_minute=row["requests_per_minute"],
        tokens_per_minute=row["tokens_per_minute"],
        spend_limit=row["spend_limit"],
        spend_window=row["spend_window"],
        expires_at=row["expires_at"],
    )
    return Key(
        id=row["id"],
        account_id=row["account_id"],
        settings=settings,
        spent=0 if row["counted_from"] < window_start(row["spend_window"], now) else row["counted"],
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
        used_at=row["used_at"],
    )


def _within(address: str, networks: Sequence[str]) -> bool:
    try:
        peer = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(peer, "ipv4_mapped", None)
    return any((mapped or peer) in ipaddress.ip_network(network, strict=False) for network in networks)


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECK)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
