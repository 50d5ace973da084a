"""One record per model: what it is, where it came from, how it wants to be asked."""

from unmask.catalogue.record import Canary, Record, record_for, shipped_records

__all__ = ["Canary", "Record", "record_for", "shipped_records"]
