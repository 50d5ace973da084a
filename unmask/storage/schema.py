"""The tables. What is written here is what the newest migration leaves; a test compares the two.

Times are Unix milliseconds, amounts nano-dollars, both as 64-bit integers. Digests are hexadecimal.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the type is exactly INTEGER.
Serial = BigInteger().with_variant(Integer, "sqlite")

DEFAULT_PLAN = "default"

plans = Table(
    "plans",
    metadata,
    Column("name", Text, primary_key=True),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    CheckConstraint("requests_per_minute > 0", name="requests"),
    CheckConstraint("tokens_per_minute > 0", name="tokens"),
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("plan", Text, ForeignKey("plans.name"), nullable=False),
    Column("state", Text, nullable=False),  # active, frozen, closed
    # Both follow from the entries and the open charges; they stand here so that one statement can test and take.
    Column("balance", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    CheckConstraint("state IN ('active', 'frozen', 'closed')", name="state"),
    CheckConstraint("held >= 0 AND held <= balance", name="covered"),
)

people = Table(
    "people",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("email", Text, nullable=False, unique=True),
    Column("password", Text, nullable=False),  # argon2id; empty for whoever signs in elsewhere alone
    Column("admin", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

identities = Table(
    "identities",
    metadata,
    Column("issuer", Text, primary_key=True),  # of an OpenID Connect provider
    Column("subject", Text, primary_key=True),  # somebody there
    Column("person_id", Text, ForeignKey("people.id"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("digest", Text, primary_key=True),  # of the token, which only the browser has
    Column("person_id", Text, ForeignKey("people.id"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

invitations = Table(
    "invitations",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("purpose", Text, nullable=False),  # first_admin
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),  # the public part of the key
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False),  # HMAC-SHA256(pepper, key)
    Column("pepper", Text, nullable=False),  # which pepper
    Column("scopes", Text, nullable=False),  # JSON array
    Column("models", Text),  # JSON array; null: all
    Column("networks", Text),  # JSON array of addresses and CIDR blocks; null: any
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("spend_limit", BigInteger),
    Column("spend_window", Text),  # day, week, month; null: the limit never resets
    # Spent in the window that began at `window_started`, open charges included; `carried` of it by the key before.
    Column("spent", BigInteger, nullable=False),
    Column("carried", BigInteger, nullable=False),
    Column("window_started", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("used_at", BigInteger),
    CheckConstraint("spend_window IN ('day', 'week', 'month')", name="window"),
    CheckConstraint("spent >= 0 AND carried >= 0", name="spent"),
)

charges = Table(
    "charges",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("key_id", Text, ForeignKey("keys.id")),
    Column("request", Text, nullable=False),  # x-request-id: the caller may have chosen it, so it identifies nothing
    Column("model", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("state", Text, nullable=False),  # held, then one of settled, released, expired
    Column("window_start", BigInteger, nullable=False),  # the key's window that it counts in
    Column("held_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    CheckConstraint("amount >= 0 AND tokens >= 0", name="amount"),
    CheckConstraint("state IN ('held', 'settled', 'released', 'expired')", name="state"),
    Index("ix_charges_state_expires_at", "state", "expires_at"),
    Index("ix_charges_account_id_ended_at", "account_id", "ended_at"),
    Index("ix_charges_account_id_held_at_id", "account_id", "held_at", "id"),
    Index("ix_charges_key_id_window_start", "key_id", "window_start"),
)

replays = Table(
    "replays",
    metadata,
    Column("account_id", Text, ForeignKey("accounts.id"), primary_key=True),
    Column("digest", Text, primary_key=True),  # of the Idempotency-Key
    Column("request", Text, nullable=False),  # digest of tier and body
    Column("charge_id", Text, ForeignKey("charges.id"), nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

# One row moves `amount` from the book `debit` to the book `credit`, so that all books always sum to zero.
# A book is an account's id, or one of ours: @cash, @revenue, @promotion, @forfeited.
entries = Table(
    "entries",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),  # charge, top_up, free_credit, refund, pay_out, forfeit
    Column("debit", Text, nullable=False),
    Column("credit", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("reference", Text, nullable=False),
    Column("note", Text, nullable=False),
    CheckConstraint("amount > 0", name="amount"),
    CheckConstraint("debit <> credit", name="books"),
    UniqueConstraint("kind", "reference"),
    Index("ix_entries_debit_id", "debit", "id"),
    Index("ix_entries_credit_id", "credit", "id"),
    sqlite_autoincrement=True,
)

prices = Table(
    "prices",
    metadata,
    Column("model", Text, primary_key=True),  # an id, or * for models without a price of their own
    Column("tier", Text, primary_key=True),
    Column("nano_per_million", BigInteger, nullable=False),
    Column("set_at", BigInteger, nullable=False),
    CheckConstraint("nano_per_million >= 0", name="price"),
    CheckConstraint("tier IN ('default', 'batch')", name="tier"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("detail", Text, nullable=False),  # JSON object, never a secret
    Column("address", Text, nullable=False),
    Index("ix_audit_subject_id", "subject", "id"),
    sqlite_autoincrement=True,
)

# What the operator adds to the catalogue: read and written by `unmask.catalogue`.
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

# What came of each gate. The last row of a model, gate and fingerprint counts.
catalogue_gates = Table(
    "catalogue_gates",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("gate", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),  # of the weights and of what was asked of the gate
    Column("passed", Boolean, nullable=False),
    Column("finding", Text, nullable=False),  # one sentence
    Column("fields", Text, nullable=False),  # JSON object: what the gate found out for the record
    Index("ix_catalogue_gates_model_id", "model", "id"),
    sqlite_autoincrement=True,
)

# One row, raised by every change above: what a running server looks at.
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

APPEND_ONLY = ("entries", "audit", "catalogue_events", "catalogue_measurements", "catalogue_gates")
