"""Measurements: single values with their provenance. They are added and never changed."""

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from unmask.errors import StorageError, UsageError

if TYPE_CHECKING:
    from unmask.evaluate.results import Results

Origin = Literal["published", "measured"]

MTEB, LOCAL, WORDS, COST = "MTEB(eng, v1)", "local", "word level", "cost"
SPEED, ONBOARDING, PARITY = "speed", "onboarding", "parity"

TEXTS_PER_SECOND, TOKENS_PER_SECOND = "texts per second", "tokens per second"
# Not "peak memory": values of that name were measured in a process that held more than the model, and are too low.
PEAK_MEMORY = "peak resident memory"

# For values of ours, where "unknown" would be our own fault.
_WHOLE = ("on", "revision", "hardware", "command", "raw")


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One measured value of a model. None means not known.

    Attributes:
        model: id of the record it belongs to.
        group: the suite of a score, or "cost", "speed", "onboarding" or "parity".
        what: the task of a score, or the quantity.
        category, metric: of a score, in mteb's words; of parity, the runtime and the precision of its files.
        value, unit: scores are on a scale from 0 to 100, and their unit is "score".
        interval: 95 %, where there is one.
        examples: what the value is over.
        origin: "measured" by this project or by the operator of this server, or "published" by somebody else.
        by: who found it.
        on: the day it was found, or for a published one the day as of which it stood there.
        revision: of the weights.
        hardware, command: on what, and how to find it again.
        raw: the file or page that it can be read in: an address, or a path in this repository.
        note: what a reader should know besides.

    Raises:
        ValueError: a measured value lacks a part of its provenance.
    """

    model: str
    group: str
    what: str
    category: str = ""
    metric: str = ""
    value: float
    unit: str
    interval: tuple[float, float] | None = None
    examples: int | None = None
    origin: Origin
    by: str
    on: date | None = None
    revision: str | None = None
    hardware: str | None = None
    command: str | None = None
    raw: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        missing = [name for name in _WHOLE if getattr(self, name) is None]
        if self.origin == "measured" and missing:
            raise ValueError(
                f"a measured value of {self.what!r} needs {', '.join(missing)}: without, nobody can check it"
            )


def parity_quantity(runtime: str, precision: str, kind: Literal["mean", "worst"]) -> str:
    """Return the quantity of a measurement of parity: `worst cosine in llama.cpp, q8`."""
    return f"{kind} cosine in {runtime}, {precision}"


_DECODER = msgspec.json.Decoder(Measurement)


def read_measurements(file: Path) -> list[Measurement]:
    """Read the measurements of a file with one JSON object per line.

    Raises:
        UsageError: a line is not a measurement.
    """
    measurements = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            measurements.append(_DECODER.decode(line))
        except msgspec.DecodeError as error:
            raise UsageError(f"line {number} of {file.name} is no measurement: {error}") from error
    return measurements


def append_measurements(file: Path, measurements: Iterable[Measurement]) -> None:
    """Add measurements to the end of a file, which is made if it is not there. Nothing in it is touched.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = b"".join(msgspec.json.encode(measurement) + b"\n" for measurement in measurements)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(lines)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error


def measurements_of(
    results: "Results", name: str, model: str, *, by: str, raw: str, cost_note: str = ""
) -> list[Measurement]:
    """Convert the results of `unmask evaluate` for one model to measurements with their provenance.

    Args:
        results: of the run.
        name: the model's name in it.
        model: id of the record that the values belong to.
        by: who ran it.
        raw: where the results can be read.
        cost_note: what a reader of the speeds and the memory should know, such as that the machine was busy.

    Raises:
        UsageError: no such model was evaluated.
    """
    result = next((result for result in results.models if result.name == name), None)
    if result is None:
        names = ", ".join(result.name for result in results.models)
        raise UsageError(f"{name!r} is not among the evaluated models; there are {names}")
    from_ = results.provenance
    shared = {
        "model": model,
        "origin": "measured",
        "by": by,
        "on": date.fromisoformat(from_.started[:10]),
        "revision": result.revision,
        "hardware": from_.machine,
        "command": from_.command,
        "raw": raw,
    }
    # Scores of data from a folder belong to the offline suite, whether the suite or the task was named.
    suite = "MTEB(eng, v2)" if results.suites == ["mteb-eng-v2"] else MTEB
    scores = [
        Measurement(
            group=WORDS if score.category == "WordLevel" else LOCAL if score.data is not None else suite,
            what=score.task,
            category=score.category,
            metric=score.metric,
            value=round(score.score, 4),
            unit="score",
            interval=(round(score.interval[0], 4), round(score.interval[1], 4)) if score.interval else None,
            examples=score.examples or None,
            **shared,
        )
        for score in result.scores
        if score.score is not None
    ]
    cost = result.cost
    amounts = (
        (TEXTS_PER_SECOND, cost.texts_per_second, "texts/s"),
        (TOKENS_PER_SECOND, cost.tokens_per_second, "tokens/s"),
        (PEAK_MEMORY, cost.peak_resident_bytes, "bytes"),
    )
    return scores + [
        Measurement(group=COST, what=what, value=round(value, 2), unit=unit, note=cost_note, **shared)
        for what, value, unit in amounts
        if value is not None
    ]


def newest(measurements: Sequence[Measurement]) -> dict[tuple[str, str, Origin], Measurement]:
    """Return the last added measurement of each group, quantity and origin."""
    return {(m.group, m.what, m.origin): m for m in measurements}
