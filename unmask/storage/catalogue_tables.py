"""The tables of `unmask.catalogue`: the operator's records, events, measurements and gates; votes and notices."""

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Table, Text

from unmask.storage.metadata import Serial, metadata

catalogue_records = Table(
    "catalogue_records",
    metadata,
    Column("model", Text, primary_key=True),
    Column("fields", Text, nullable=False),  # JSON object, laid over the shipped record where there is one
    Column("source", Text),  # where the weights are, for this server alone; null: where the model's id says
    Column("changed_at", BigInteger, nullable=False),
)

catalogue_events = Table(
    "catalogue_events",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("event", Text, nullable=False),  # JSON, a step of the lifecycle
    Index("ix_catalogue_events_model_id", "model", "id"),
    sqlite_autoincrement=True,
)

catalogue_measurements = Table(
    "catalogue_measurements",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("measurement", Text, nullable=False),  # JSON
    Index("ix_catalogue_measurements_model_id", "model", "id"),
    sqlite_autoincrement=True,
)

# Outcome of each gate. The last row of a model, gate and fingerprint counts.
catalogue_gates = Table(
    "catalogue_gates",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("gate", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),  # of the weights and the settings of the gate
    Column("passed", Boolean, nullable=False),
    Column("finding", Text, nullable=False),  # one sentence
    Column("fields", Text, nullable=False),  # JSON object: fields of the record that the gate measured
    Index("ix_catalogue_gates_model_id", "model", "id"),
    sqlite_autoincrement=True,
)

# One row with a number that every change above raises. Running servers poll it.
catalogue_version = Table(
    "catalogue_version", metadata, Column("number", BigInteger, primary_key=True, autoincrement=False)
)

votes = Table(
    "votes",
    metadata,
    Column("account_id", Text, ForeignKey("accounts.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("note", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_votes_model_at", "model", "at"),
)

notices = Table(
    "notices",
    metadata,
    Column("account_id", Text, ForeignKey("accounts.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("seen_at", BigInteger),
    Column("mailed_at", BigInteger),
)
