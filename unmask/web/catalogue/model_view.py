"""`ModelView`: a model as pages show it: its record, its measurements, and the engine of this server, if it has one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec

from unmask.accounts import tariff
from unmask.catalogue import STATUSES, Catalogue, Entry, Measurement, Record, Status
from unmask.catalogue.figures import Figures
from unmask.catalogue.lifecycle import MEANING
from unmask.catalogue.pricing import charged_prices
from unmask.router import ModelRegistry, ServedModel
from unmask.router.served_model import FIELDS_OF_WEIGHTS

DisplayStatus = Status | Literal["reference"]

# Order of lists: models that answer, models that will, references, models that no longer answer.
STATUS_ORDER: tuple[DisplayStatus, ...] = (
    "live", "deprecated", "staged", "benchmarking", "coming soon", "requested", "reference", "retired",
)  # fmt: skip
STATUS_MEANINGS: dict[DisplayStatus, str] = {
    **MEANING,
    "reference": "Others are measured against it. This project does not serve it.",
}


@dataclass(frozen=True)
class ModelView:
    """One model on the pages.

    Attributes:
        entry: record and measurements in the catalogue.
        served: the model's engine; None if this server does not serve it.
        prices: the operator's prices; None on a server that charges nobody.
    """

    entry: Entry
    served: ServedModel | None
    prices: Sequence[tariff.TariffPrice] | None = None

    @cached_property
    def record(self) -> Record:
        """The catalogue's record; for a served model with the fields read from its weights and the prices charged."""
        if self.served is None:
            return self.entry.record
        changes = {
            name: value for name in FIELDS_OF_WEIGHTS if (value := getattr(self.served.record, name)) is not None
        }
        if self.prices is not None:
            changes["prices"] = charged_prices(self.entry.record, self.prices)
        return msgspec.structs.replace(self.entry.record, **changes)

    @property
    def figures(self) -> Figures:
        return self.entry.figures

    @property
    def display_status(self) -> DisplayStatus:
        """Status on this server: a served model is live or deprecated, whatever status its record was shipped with."""
        status = self.entry.record.status
        if self.served is not None:
            return "deprecated" if status == "deprecated" else "live"
        if status == "live":  # on another server, perhaps
            return "staged"
        return status or ("reference" if self.entry.record.role == "reference" else "requested")

    @property
    def is_served(self) -> bool:
        return self.served is not None


def model_views(
    catalogue: Catalogue, models: ModelRegistry, prices: Sequence[tariff.TariffPrice] | None = None
) -> list[ModelView]:
    """Return a view of every entry of the catalogue."""
    served = {model.record.id: model for model in models.list()}
    return [ModelView(entry, served.get(entry.record.id), prices) for entry in catalogue.entries()]


def find_model_view(
    catalogue: Catalogue, models: ModelRegistry, id: str, prices: Sequence[tariff.TariffPrice] | None = None
) -> ModelView | None:
    """Return the view of the entry with this id or alias."""
    entry = catalogue.get(id)
    return ModelView(entry, models.find(entry.record.id), prices) if entry else None


@dataclass(frozen=True)
class PipelineStep:
    """One stage on the way to live. `place` is its place relative to the model's current stage."""

    status: Status
    place: Literal["past", "here", "ahead"]
    meaning: str


def pipeline(view: ModelView) -> list[PipelineStep]:
    """List the stages from the first one on record up to live; later stages only if the model has reached them."""
    status = view.display_status
    if status == "reference":
        return []
    here = STATUSES.index(status)
    history = view.record.history
    first = min([here, *(STATUSES.index(event.status) for event in history)])
    last = max(here, STATUSES.index("live"))
    return [
        PipelineStep(stage, "past" if at < here else "here" if at == here else "ahead", MEANING[stage])
        for at, stage in enumerate(STATUSES[: last + 1])
        if at >= first
    ]


@dataclass(frozen=True)
class MeasurementSource:
    """Source of one or more values: same origin, author, day, revision, machine and command.

    Attributes:
        number: stands beside each value on the page.
        example: one of the measurements.
        count: number of measurements from this source.
    """

    number: int
    example: Measurement
    count: int


def source_key(m: Measurement) -> tuple[object, ...]:
    """Return a key that two measurements share if they are from the same source."""
    return (m.origin, m.by, m.on, m.revision, m.hardware, m.command, m.raw, m.note)


def number_sources(measurements: Iterable[Measurement]) -> dict[tuple[object, ...], MeasurementSource]:
    """Group measurements by source; sources are numbered in the order of their first value."""
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(source_key(measurement), []).append(measurement)
    return {
        key: MeasurementSource(number, group[0], len(group))
        for number, (key, group) in enumerate(groups.items(), start=1)
    }
