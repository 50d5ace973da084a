"""An index of the attempts that are deleted after a time."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    is_free = sa.text("charge IS NULL AND cost = 0")
    op.create_index(
        "ix_provider_attempts_free",
        "provider_attempts",
        ["charge", "at"],  # SQLite would prefer the index of charges to one without it
        unique=False,
        postgresql_where=is_free,
        sqlite_where=is_free,
    )
