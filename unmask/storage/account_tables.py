"""The tables of `unmask.accounts`: plans, accounts, people, keys, charges, the ledger, prices and the audit log."""

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Index, Table, Text, UniqueConstraint

from unmask.storage.metadata import Serial, metadata

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
    Column("subject", Text, primary_key=True),  # id of the person at the issuer
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
    # Spent in the window that began at `window_started`, open charges included. `carried` of it is from the key before,
    # where that was rotated by a version without `counter_id`.
    Column("spent", BigInteger, nullable=False),
    Column("carried", BigInteger, nullable=False),
    Column("window_started", BigInteger, nullable=False),
    Column("counter_id", Text),  # an earlier key, whose row counts the spend of this one too; null: this row
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
    Column("provider", Text),  # who computed the vectors; null for this server's own engine, and before it is settled
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
    # Later requests that were answered for this charge. Servers of an older version insert without it.
    Column("repeats", BigInteger, nullable=False, server_default="0"),
)

# One row moves `amount` from the book `debit` to the book `credit`, so that all books always sum to zero.
# A book is an account's id, or one of ours: @cash, @revenue, @promotion, @forfeited, @cost, @payable:PROVIDER.
entries = Table(
    "entries",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),  # see unmask.accounts.ledger
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
