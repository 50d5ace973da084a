"""The number of replays of each charge."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    # The default counts for rows that are there, and for servers of the version before that still run.
    op.add_column("replays", sa.Column("repeats", sa.BigInteger(), server_default="0", nullable=False))
