"""The catalogue: one record per model with its specification, status, prompts and measurements."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.catalogue.catalogue import (
        Catalogue,
        Entry,
        parse_record,
        record_for,
        shipped_measurements,
        shipped_records,
    )
    from unmask.catalogue.lifecycle import STATUSES, Event, Status
    from unmask.catalogue.measurement import Measurement, append_measurements, measurements_of
    from unmask.catalogue.record import Canary, Record, Specification

__all__ = [
    "STATUSES",
    "Canary",
    "Catalogue",
    "Entry",
    "Event",
    "Measurement",
    "Record",
    "Specification",
    "Status",
    "append_measurements",
    "measurements_of",
    "parse_record",
    "record_for",
    "shipped_measurements",
    "shipped_records",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "catalogue": ("Catalogue", "Entry", "parse_record", "record_for", "shipped_measurements", "shipped_records"),
        "lifecycle": ("STATUSES", "Event", "Status"),
        "measurement": ("Measurement", "append_measurements", "measurements_of"),
        "record": ("Canary", "Record", "Specification"),
    },
)
