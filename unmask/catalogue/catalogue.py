"""All records of one process, with their measurements: those that ship, and whatever else is served or added."""

import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import as_file, files
from pathlib import Path

import msgspec

from unmask.catalogue.figures import Figures, figures
from unmask.catalogue.measurement import Measurement, read_measurements
from unmask.catalogue.record import Record
from unmask.checkpoint.shipped import DEFAULT_MODEL, SHIPPED
from unmask.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """A record with its measurements."""

    record: Record
    measurements: tuple[Measurement, ...] = ()

    @cached_property
    def figures(self) -> Figures:
        return figures(self.measurements)


@dataclass
class Catalogue:
    """The models on record: entries by id, in the order in which they were added.

    Records are parsed once and their figures are worked out once; a page reads both from here.
    """

    _entries: dict[str, Entry] = field(default_factory=dict)
    _aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def shipped(cls) -> "Catalogue":
        """Return a catalogue of the records that come with the package."""
        catalogue = cls()
        measured = shipped_measurements()
        for record in shipped_records().values():
            catalogue.put(record, measured.get(record.id, ()))
        return catalogue

    def put(self, record: Record, measurements: Iterable[Measurement] = ()) -> None:
        """Add a record, or replace the one of its id and keep its measurements."""
        before = self._entries.get(record.id)
        earlier = before.measurements if before else ()
        self._entries[record.id] = Entry(record, (*earlier, *measurements))
        self._aliases.update(dict.fromkeys(record.aliases, record.id))

    def take(self, other: "Catalogue") -> None:
        """Take over the entries of another catalogue, and keep those that only this one has. Atomic for readers."""
        self._aliases = {**self._aliases, **other._aliases}
        self._entries = {**other._entries, **{id: e for id, e in self._entries.items() if id not in other._entries}}

    def get(self, id: str) -> Entry | None:
        """Return the entry of an id or alias."""
        return self._entries.get(id) or self._entries.get(self._aliases.get(id, ""))

    def with_revision(self, revision: str, compat: str) -> Record | None:
        """Return a record that knows the vectors of these files in this text handling; None if there is none."""
        records = (entry.record for entry in self._entries.values())
        matching = (r for r in records if r.revision == revision and r.compat == compat and r.canary is not None)
        return next(matching, None)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())


def parse_record(text: str, name: str) -> Record:
    """Parse a record in TOML.

    Raises:
        UsageError: it is not TOML, a field is unknown or wrong, or its history takes a step that is not allowed.
    """
    try:
        record = msgspec.convert(tomllib.loads(text), Record)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{name} is no record of a model: {error}") from error
    return with_embed_alias(record)


@cache
def shipped_records() -> dict[str, Record]:
    """Return the records that ship with the package, by id: the default model first, then by name.

    A record of ours whose weights are not in the package yet is left out.
    """
    folder = files("unmask.catalogue").joinpath("records")
    records = [
        parse_record(file.read_text(encoding="utf-8"), file.name)
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    ]
    records = [record for record in records if record.owned_by != "unmask" or record.id in SHIPPED]
    records.sort(
        key=lambda record: (
            record.id != DEFAULT_MODEL,
            record.owned_by != "unmask",
            record.role == "reference",
            record.id.lower(),
        )
    )
    return {record.id: record for record in records}


@cache
def shipped_measurements() -> dict[str, tuple[Measurement, ...]]:
    """Return the measurements that ship with the package, by model id."""
    by_model: dict[str, list[Measurement]] = {}
    with as_file(files("unmask.catalogue").joinpath("measurements")) as folder:
        for file in sorted(folder.glob("*.jsonl")):
            for measurement in read_measurements(file):
                by_model.setdefault(measurement.model, []).append(measurement)
    return {id: tuple(measurements) for id, measurements in by_model.items()}


def record_for(name: str) -> Record:
    """Return the record of a model named on the command line: the shipped one, or one made from the name.

    The id of a local path is its last part, so that responses show no directory of this machine.
    """
    shipped = shipped_records().get(name)
    if shipped is not None:
        return shipped
    path = Path(name).expanduser()
    return named_record(path.name.removesuffix(".gguf") if path.exists() else name)


def named_record(id: str) -> Record:
    """Make a record from an id alone: the id, and its owner."""
    owner = id.split("/", maxsplit=1)[0] if "/" in id else "local"
    return with_embed_alias(Record(id=id, name=id, created=int(time.time()), owned_by=owner))


def with_embed_alias(record: Record) -> Record:
    """Add an alias with "embed" in it, which some clients filter by."""
    if any("embed" in name.lower() for name in (record.id, *record.aliases)):
        return record
    return msgspec.structs.replace(record, aliases=(*record.aliases, f"{record.id}-embed"))
