"""One count of the spend for a key and those that replace it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("keys", sa.Column("counter_id", sa.Text(), nullable=True))
