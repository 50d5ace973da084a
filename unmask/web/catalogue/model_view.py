"""A model as visitors see it: its record, its measurements, and whether this server answers for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec

from unmask.accounts import tariff
from unmask.catalogue import STATUSES, Catalogue, Entry, Measurement, Record, Status
from unmask.catalogue.figures import Figures
from unmask.catalogue.lifecycle import MEANING
from unmask.catalogue.pricing import prices_here
from unmask.router import ModelRegistry, ServedModel
from unmask.router.served_model import FIELDS_OF_WEIGHTS

Standing = Status | Literal["reference"]

# As a visitor looks for them: what answers, what will, what others are measured against, what is over.
ORDER: tuple[Standing, ...] = (
    "live", "deprecated", "staged", "benchmarking", "coming soon", "requested", "reference", "retired",
)  # fmt: skip
MEANINGS: dict[Standing, str] = {
    **MEANING,
    "reference": "Others are measured against it. This project does not serve it.",
}


@dataclass(frozen=True)
class Shown:
    """One model on the pages.

    Attributes:
        served: its engine, where this server answers for it.
        charged: the operator's prices; None for a server that charges nobody.
    """

    entry: Entry
    served: ServedModel | None
    charged: Sequence[tariff.Price] | None = None

    @cached_property
    def record(self) -> Record:
        if self.served is None:
            return self.entry.record
        known = {name: value for name in FIELDS_OF_WEIGHTS if (value := getattr(self.served.record, name)) is not None}
        if self.charged is not None:
            known["prices"] = prices_here(self.entry.record, self.charged)
        return msgspec.structs.replace(self.entry.record, **known)

    @property
    def figures(self) -> Figures:
        return self.entry.figures

    @property
    def standing(self) -> Standing:
        """Where it stands here: a model that this server answers for is live, whatever its record was shipped with."""
        status = self.entry.record.status
        if self.served is not None:
            return "deprecated" if status == "deprecated" else "live"
        if status == "live":  # elsewhere, perhaps
            return "staged"
        return status or ("reference" if self.entry.record.role == "reference" else "requested")

    @property
    def answers(self) -> bool:
        return self.served is not None


def all_shown(
    catalogue: Catalogue, models: ModelRegistry, charged: Sequence[tariff.Price] | None = None
) -> list[Shown]:
    """Every entry, those that this server answers for with their engines and what they cost."""
    served = {model.record.id: model for model in models.list()}
    return [Shown(entry, served.get(entry.record.id), charged) for entry in catalogue.entries()]


def one_shown(
    catalogue: Catalogue, models: ModelRegistry, id: str, charged: Sequence[tariff.Price] | None = None
) -> Shown | None:
    """The entry of an id or alias."""
    entry = catalogue.get(id)
    return Shown(entry, models.find(entry.record.id), charged) if entry else None


@dataclass(frozen=True)
class Step:
    """One stage of the way to live. `place` is where it lies from where the model stands."""

    status: Status
    place: Literal["past", "here", "ahead"]
    meaning: str


def pipeline(shown: Shown) -> list[Step]:
    """The stages from the first one on record up to live, and those after it only if the model has got there."""
    standing = shown.standing
    if standing == "reference":
        return []
    here = STATUSES.index(standing)
    history = shown.record.history
    first = min([here, *(STATUSES.index(event.status) for event in history)])
    last = max(here, STATUSES.index("live"))
    return [
        Step(status, "past" if at < here else "here" if at == here else "ahead", MEANING[status])
        for at, status in enumerate(STATUSES[: last + 1])
        if at >= first
    ]


@dataclass(frozen=True)
class Source:
    """Where values come from; those that share all of this share a number."""

    number: int
    example: Measurement
    count: int

    @property
    def key(self) -> tuple[object, ...]:
        return source_key(self.example)


def source_key(m: Measurement) -> tuple[object, ...]:
    """What two measurements have in common if they came the same way."""
    return (m.origin, m.by, m.on, m.revision, m.hardware, m.command, m.raw, m.note)


def sources(measurements: Iterable[Measurement]) -> dict[tuple[object, ...], Source]:
    """Numbered in the order of their first value."""
    found: dict[tuple[object, ...], list[Measurement]] = {}
    for measurement in measurements:
        found.setdefault(source_key(measurement), []).append(measurement)
    return {key: Source(number, group[0], len(group)) for number, (key, group) in enumerate(found.items(), start=1)}
