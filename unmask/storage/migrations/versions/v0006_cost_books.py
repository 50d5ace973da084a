"""The price and the booking of each attempt at a provider, and hedges among the attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_TABLE = "provider_attempts"


def upgrade() -> None:
    with op.batch_alter_table(_TABLE, table_kwargs={"sqlite_autoincrement": True}) as table:
        table.add_column(sa.Column("price", sa.BigInteger(), nullable=True))
        table.add_column(sa.Column("booking", sa.Text(), nullable=True))
        table.drop_constraint(op.f("ck_provider_attempts_reason"), type_="check")
        table.create_check_constraint(
            op.f("ck_provider_attempts_reason"), "reason IN ('answer', 'retry', 'hedge', 'probe')"
        )
    op.create_index("ix_provider_attempts_charge", _TABLE, ["charge"], unique=False)
    op.create_index("ix_provider_attempts_booking", _TABLE, ["booking"], unique=False)
    is_open = sa.text("booking IS NULL AND cost > 0")
    op.create_index(
        "ix_provider_attempts_open", _TABLE, ["id"], unique=False, postgresql_where=is_open, sqlite_where=is_open
    )
