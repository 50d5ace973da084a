"""Every table. The newest migration leaves exactly these; a test compares the two.

Import tables from here: `metadata` is only complete once all modules of tables are loaded.
"""

from unmask.storage.account_tables import (
    DEFAULT_PLAN,
    accounts,
    audit,
    charges,
    entries,
    identities,
    invitations,
    keys,
    people,
    plans,
    prices,
    replays,
    sessions,
)
from unmask.storage.catalogue_tables import (
    catalogue_events,
    catalogue_gates,
    catalogue_measurements,
    catalogue_records,
    catalogue_version,
    notices,
    votes,
)
from unmask.storage.metadata import metadata
from unmask.storage.provider_tables import provider_attempts, provider_events

APPEND_ONLY = ("entries", "audit", "catalogue_events", "catalogue_measurements", "catalogue_gates", "provider_events")

__all__ = [
    "APPEND_ONLY",
    "DEFAULT_PLAN",
    "accounts",
    "audit",
    "catalogue_events",
    "catalogue_gates",
    "catalogue_measurements",
    "catalogue_records",
    "catalogue_version",
    "charges",
    "entries",
    "identities",
    "invitations",
    "keys",
    "metadata",
    "notices",
    "people",
    "plans",
    "prices",
    "provider_attempts",
    "provider_events",
    "replays",
    "sessions",
    "votes",
]
