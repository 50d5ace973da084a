"""The tables of `unmask.router`: verdicts on providers."""

from sqlalchemy import BigInteger, Column, Index, Table, Text

from unmask.storage.metadata import Serial, metadata

# The last row of a provider and model counts.
provider_events = Table(
    "provider_events",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("verdict", Text, nullable=False),  # quarantined, admitted
    Column("finding", Text, nullable=False),  # one sentence; empty for admitted
    Column("passed_at", BigInteger),  # when a canary was last right there, as the process knew that wrote the row
    Column("actor", Text, nullable=False),  # "canaries", or a person's id, or "command line"
    Index("ix_provider_events_model_id", "model", "id"),
    sqlite_autoincrement=True,
)
