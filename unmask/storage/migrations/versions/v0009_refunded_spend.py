"""Refunded charges leave the spend of their keys."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

# Refunds were booked without the keys before. Each charge counts in the row of the key, or of the one it replaces.
_REFUNDED = """
    SELECT counter.id AS id, SUM(charges.amount) AS amount
    FROM charges
    JOIN entries ON entries.kind = 'refund' AND entries.reference = charges.id
    JOIN keys AS own ON own.id = charges.key_id
    JOIN keys AS counter ON counter.id = COALESCE(own.counter_id, own.id)
    WHERE charges.state = 'settled' AND charges.window_start = counter.window_started
    GROUP BY counter.id
"""


def upgrade() -> None:
    connection = op.get_bind()
    for id, amount in connection.execute(sa.text(_REFUNDED)).all():
        # A count that is too small already is drift, for `unmask ledger verify` to report.
        connection.execute(
            sa.text("UPDATE keys SET spent = spent - :amount WHERE id = :id AND spent >= :amount"),
            {"id": id, "amount": int(amount)},
        )
