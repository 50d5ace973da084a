"""The tables about providers: verdicts of `unmask.router`, and attempts, whose cost `unmask.accounts` keeps."""

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Table, Text, text

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

# Attempts whose cost is not in the ledger yet.
_OPEN = text("booking IS NULL AND cost > 0")

# Attempts that no charge, no bill and no entry of the ledger refers to: they are deleted after a time.
_FREE = text("charge IS NULL AND cost = 0")

provider_attempts = Table(
    "provider_attempts",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("charge", Text),  # of the request that it answered; null for failures and canaries
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("milliseconds", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),  # answered, discarded, or a signal of unmask.router.signals
    Column("reason", Text, nullable=False),  # answer, retry, hedge, probe
    Column("tokens", BigInteger, nullable=False),  # by our count, which is charged
    Column("their_tokens", BigInteger),  # by the provider's count
    Column("price", BigInteger),  # nano-dollars per million tokens; null in rows older than this column
    Column("cost", BigInteger, nullable=False),  # nano-dollars that the provider will bill
    Column("booking", Text),  # reference of the entry that has the cost; null before it is booked, and for no cost
    CheckConstraint("cost >= 0 AND tokens >= 0", name="cost"),
    CheckConstraint("reason IN ('answer', 'retry', 'hedge', 'probe')", name="reason"),
    Index("ix_provider_attempts_provider_at", "provider", "at"),
    Index("ix_provider_attempts_charge", "charge"),
    Index("ix_provider_attempts_booking", "booking"),
    Index("ix_provider_attempts_open", "id", postgresql_where=_OPEN, sqlite_where=_OPEN),
    Index("ix_provider_attempts_free", "charge", "at", postgresql_where=_FREE, sqlite_where=_FREE),
    sqlite_autoincrement=True,
)
