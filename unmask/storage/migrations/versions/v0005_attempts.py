"""Attempts at providers with their cost, and the provider of each charge."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("charges", sa.Column("provider", sa.Text(), nullable=True))
    op.create_table(
        "provider_attempts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("charge", sa.Text(), nullable=True),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("milliseconds", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("their_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("cost >= 0 AND tokens >= 0", name=op.f("ck_provider_attempts_cost")),
        sa.CheckConstraint("reason IN ('answer', 'retry', 'probe')", name=op.f("ck_provider_attempts_reason")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_provider_attempts")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_provider_attempts_provider_at", "provider_attempts", ["provider", "at"], unique=False)
