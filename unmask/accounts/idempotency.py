"""Idempotency-Keys: a request that is repeated with its key is answered again for the charge of the first one."""

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.errors import KeyReused, ReplayLimitReached, RequestInProgress
from unmask.storage.database import RawStatement, insert
from unmask.storage.schema import charges, entries, replays

REPLAY_MS = 24 * 3600 * 1000  # how long an Idempotency-Key is remembered

# Replays of one charge. Each is computed again, so more would be work for nothing; a client whose answer is lost on
# the way repeats its request two or three times.
MAX_REPLAYS = 5

# One statement tests and counts, so that requests in two processes cannot pass the bound together.
_REPLAY = RawStatement(
    "UPDATE replays SET repeats = repeats + 1 WHERE account_id = :account AND digest = :digest "
    "AND charge_id = :charge AND repeats < :most"
)


def find_replay(connection: Connection, account: str, key: str, body: str, now: int) -> tuple[str, int] | None:
    """Return charge and amount of an earlier request with the same Idempotency-Key; None if there is none to repeat.

    A replay counts when it begins, and also if it fails: a client that leaves before each answer costs as much.

    Args:
        account: of the caller.
        key: digest of the Idempotency-Key.
        body: digest of tier and body.
        now: in milliseconds.

    Raises:
        KeyReused: the key came with another request.
        RequestInProgress: the earlier request has not ended.
        ReplayLimitReached: it was repeated as often as one charge allows.
    """
    earlier = connection.execute(
        sa.select(replays.c.request, replays.c.charge_id, charges.c.state, charges.c.amount)
        .join(charges, charges.c.id == replays.c.charge_id)
        .where(replays.c.account_id == account, replays.c.digest == key, replays.c.expires_at > now)
    ).one_or_none()
    if earlier is None:
        return None
    if earlier.request != body:
        raise KeyReused("this Idempotency-Key was used for another request: choose a new one for each")
    if earlier.state == "held":
        raise RequestInProgress("the request with this Idempotency-Key is still being worked on")
    if earlier.state == "settled" and not connection.scalar(sa.select(is_refunded(earlier.charge_id))):
        _count_replay(connection, account, key, earlier.charge_id)
        return earlier.charge_id, earlier.amount
    return None  # it failed and was not charged, or has its money back, so this is the first


def _count_replay(connection: Connection, account: str, key: str, charge: str) -> None:
    values = {"account": account, "digest": key, "charge": charge, "most": MAX_REPLAYS}
    if _REPLAY.changed(connection, values) != 1:
        raise ReplayLimitReached(
            f"This request was repeated {MAX_REPLAYS} times with its Idempotency-Key, the most for one charge: send it "
            "with a new Idempotency-Key, and it is charged again."
        )


def store_replay(connection: Connection, account: str, key: str, body: str, charge: str, now: int) -> None:
    """Tie an Idempotency-Key to a charge, unless another request did so since `find_replay` looked.

    Args:
        account, key, body, now: as for `find_replay`.
        charge: id of the new charge.

    Raises:
        RequestInProgress: another request did so.
    """
    statement = insert(connection, replays).values(
        account_id=account, digest=key, request=body, charge_id=charge, expires_at=now + REPLAY_MS
    )
    failed = sa.exists().where(charges.c.id == replays.c.charge_id, charges.c.state.in_(("released", "expired")))
    written = connection.execute(
        statement.on_conflict_do_update(
            index_elements=[replays.c.account_id, replays.c.digest],
            set_={
                "request": statement.excluded.request,
                "charge_id": statement.excluded.charge_id,
                "expires_at": statement.excluded.expires_at,
                "repeats": 0,
            },
            where=sa.or_(replays.c.expires_at <= now, failed, is_refunded(replays.c.charge_id)),
        ).returning(replays.c.charge_id)
    )
    if written.one_or_none() is None:
        raise RequestInProgress("the request with this Idempotency-Key is still being worked on")


def forget_replays(connection: Connection, now: int) -> int:
    """Delete Idempotency-Keys that are older than a day. Returns their number."""
    return connection.execute(replays.delete().where(replays.c.expires_at <= now)).rowcount


def is_refunded(charge: sa.ColumnElement[str] | str) -> sa.Exists:
    """Condition that a charge was refunded."""
    return sa.exists().where(entries.c.kind == "refund", entries.c.reference == charge)
