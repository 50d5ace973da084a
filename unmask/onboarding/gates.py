"""The gates between a request and a live model. Each measures something, and refuses what is not in order.

A gate is a function of an `OnboardingContext` that returns a `GateResult`, or raises one of our errors where the model
does not pass.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.accounts.money import format_dollars
from unmask.catalogue.canary import CANARY_TEXT, Canary, check_vector, cosine
from unmask.catalogue.measurement import COST, ONBOARDING, PEAK_MEMORY, Measurement, measurements_of
from unmask.catalogue.record import Record
from unmask.catalogue.speed import SpeedPoint, measurements_of_sweep, points_of
from unmask.checkpoint import Checkpoint
from unmask.encoder import Encoder
from unmask.errors import GateFailed, UsageError
from unmask.evaluate.cost import load_model, sample_texts
from unmask.evaluate.results import Results
from unmask.evaluate.run import Evaluation, evaluate, machine
from unmask.onboarding.parity import Parity, against_file, against_transformers, require
from unmask.onboarding.sweep import DEFAULT_CALLERS, DEFAULT_LENGTHS, sweep

ProgressReporter = Callable[[int, int], None]

_HOUR_S = 3600
_MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class OnboardingOptions:
    """A model to take live, and the settings of its gates. Most fields are options of `unmask onboard`.

    Attributes:
        model: id of the record.
        source: id, folder or file to load the weights from.
        compat: "reference" gives the published LLM2Vec vectors, quirks included. Default: as the record says.
        licence: Licence of the weights, if the record does not know it.
        replace_specification: Correct the record where its specification differs from the weights.
        reference: .npz file with texts and vectors to compare with. Default: compare with transformers.
        suites: Suite to measure quality on, as "unmask evaluate" names it. Repeat it for several. Default: local.
        tasks: Task, to measure less than a suite. Repeat it for several.
        data: Folder with the data of offline tasks.
        lengths: Tokens per text in the sweep of speeds. Repeat it for several.
        callers: Concurrent callers in the sweep. Repeat it for several.
        seconds: Seconds that each point of the sweep takes.
        cost_per_hour: Dollars that the machine costs per hour, to propose a price (nano-dollars in Python).
        utilisation: Share of the hours that customers pay for, to propose a price.
        price: Dollars per million tokens, instead of a proposed price (nano-dollars in Python).
        stage: Stop before the last step; "unmask catalogue live" takes it.
        command: command of the operator, for the model's page.
        by: Author of the measurements, for the model's page.
        output: folder for the raw files.
    """

    model: str
    source: str
    compat: Literal["default", "reference"] | None = None
    licence: str | None = None
    replace_specification: bool = False
    reference: Path | None = None
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    callers: tuple[int, ...] = DEFAULT_CALLERS
    seconds: float = 2.0
    cost_per_hour: int | None = None
    utilisation: float = 0.5
    price: int | None = None
    stage: bool = False
    command: str = ""
    by: str = "the operator of this server"
    output: Path

    def __post_init__(self) -> None:
        if self.compat not in (None, "default", "reference"):
            raise UsageError(f"compat={self.compat!r}: choose default or reference")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation {self.utilisation:g}: choose more than 0, and 1 at most")
        if self.reference is not None and not self.reference.is_file():
            raise UsageError(f"--reference {self.reference} is no file")


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Attributes:
        finding: one sentence.
        fields: for the record.
        measurements: with their provenance.
        raw: everything, for the raw file.
    """

    finding: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    measurements: Sequence[Measurement] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class OnboardingContext:
    """What the gates work on. The model is loaded once, and only if a gate needs it.

    Attributes:
        wanted: what is asked for.
        record: of the model, as it stands now; gates before this one have had their say.
        checkpoint: its files.
        measured: what earlier gates measured of these weights.
    """

    wanted: OnboardingOptions
    record: Record
    checkpoint: Checkpoint
    measured: Sequence[Measurement]

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.load(self.wanted.source, compat=self.record.compat)

    def provenance(self, gate: str) -> dict[str, Any]:
        """The fields that every measurement of a gate has in common."""
        return {
            "model": self.wanted.model,
            "origin": "measured",
            "by": self.wanted.by,
            "on": datetime.now(UTC).date(),
            "revision": self.checkpoint.revision,
            "hardware": machine(),
            "command": self.wanted.command,
            # Named as the operator finds it, without a folder of this machine that is nobody else's business.
            "raw": f"UNMASK_HOME/onboarding/{self.wanted.output.name}/{gate}.json",
        }

    def single(self, gate: str, what: str, value: float, unit: str, note: str = "") -> Measurement:
        """A gate's one number."""
        return Measurement(group=ONBOARDING, what=what, value=value, unit=unit, note=note, **self.provenance(gate))


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        name: what it is about.
        asks: what decides its outcome besides the weights: it is run again when that changes.
        run: see the top of this file.
    """

    name: str
    asks: Callable[[OnboardingContext], object]
    run: Callable[[OnboardingContext, ProgressReporter], GateResult]

    def fingerprint(self, bench: OnboardingContext) -> str:
        """16 hex digits over the weights, the mode and what is asked."""
        words = f"{bench.checkpoint.revision} {bench.record.compat} {self.asks(bench)!r}"
        return hashlib.sha256(words.encode()).hexdigest()[:16]


def licence_and_size(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """Somebody says under which licence the weights are, and this machine can hold them."""
    licence = bench.wanted.licence or bench.record.licence
    if not licence:
        raise GateFailed("nobody says under which licence the weights are: read their card, and name it with --licence")
    files = bench.checkpoint.files
    size = sum(file.stat().st_size for file in files)
    tensors = bench.checkpoint.tensors
    needed = 4 * sum(math.prod(tensors.shape(name)) for name in tensors.names())
    free = _free_memory()
    if free is not None and needed > free:
        raise GateFailed(
            f"the weights take {needed / 1e9:.1f} GB in float32 and {free / 1e9:.1f} GB are free: use a larger machine"
        )
    base = bench.record.base_licence
    known = f", base {base}" if base and base != licence else ""
    if bench.record.base and not base:
        known = "; the licence of its base is not on record"
    return GateResult(
        f"{licence}{known}; {size / 1e6:,.1f} MB in {len(files)} files, {needed / 1e6:,.1f} MB in memory",
        {"licence": licence},
        [bench.single("licence", "size of the files", size, "bytes")],
        {"licence": licence, "base_licence": base, "bytes": size, "bytes_in_memory": needed},
    )


def digests(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """Every file that decides a vector has its digest on record; what is live is not exchanged under its name."""
    live = bench.record.status in ("live", "deprecated")
    known = bench.record.revision
    if live and known is not None and known != bench.checkpoint.revision:
        raise GateFailed(
            f"the weights {known} are live and these are {bench.checkpoint.revision}: vectors of the two do not mix. "
            "Retire the model first, or give the new weights a name of their own"
        )
    found = {}
    for done, file in enumerate(bench.checkpoint.files):
        tell(done, len(bench.checkpoint.files))
        with file.open("rb") as opened:
            found[f"{file.parent.name}/{file.name}"] = hashlib.file_digest(opened, "sha256").hexdigest()
    return GateResult(
        f"revision {bench.checkpoint.revision} over {len(found)} files",
        # Another revision's canary would refuse these weights; the one that ships is for the shipped ones.
        {"revision": bench.checkpoint.revision} | ({"canary": None} if known != bench.checkpoint.revision else {}),
        [bench.single("digests", "files with a digest", len(found), "files")],
        {"sha256": found},
    )


def loading(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """The weights load, encode a text, and are what the record says they are."""
    began = time.perf_counter()
    seconds = 0.0

    def open_encoder() -> Any:
        nonlocal seconds
        encoder = bench.encoder
        seconds = time.perf_counter() - began
        return _Measured(encoder)

    memory = load_model(open_encoder, sample_texts()).peak_memory_bytes
    encoder = bench.encoder
    if not np.isfinite(encoder.encode(CANARY_TEXT)).all():
        raise GateFailed("the model gives a vector with numbers that are not finite: its weights are damaged")
    said = {
        "parameters": encoder.num_parameters,
        "dimensions": encoder.dim,
        "max_tokens": encoder.max_length,
        "pooling": encoder.pooling,
        "architecture": str(encoder.checkpoint.config.get("model_type")),
    }
    known = {name: getattr(bench.record, name) for name in said}
    differing = [name for name in said if known[name] not in (None, said[name])]
    if differing and not bench.wanted.replace_specification:
        shown = ", ".join(f"{name} {said[name]} instead of {known[name]}" for name in differing)
        raise GateFailed(
            f"the weights are not what the record describes: {shown}. Name the right ones, or pass "
            "--replace-specification if the record is what is wrong"
        )
    fields: dict[str, Any] = {name: said[name] for name in said if known[name] != said[name]}
    if differing:
        note = "Specifications taken from the weights: " + ", ".join(
            f"{name} {known[name]} -> {said[name]}" for name in differing
        )
        fields["changes"] = [
            *({"on": change.on.isoformat(), "note": change.note} for change in bench.record.changes),
            {"on": datetime.now(UTC).date().isoformat(), "note": f"{note}."},
        ]
    measured = [bench.single("load", "time to load", round(seconds, 3), "s")]
    if memory is not None:
        shared = bench.provenance("load")
        measured.append(Measurement(group=COST, what=PEAK_MEMORY, value=memory, unit="bytes", **shared))
    return GateResult(f"{seconds:.1f} s; {said['parameters']:,} parameters, {said['dimensions']} dimensions", fields,
                 measured, said)  # fmt: skip


def parity(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """Its vectors are those of the given reference, or of transformers."""
    if bench.wanted.reference is not None:
        found: Parity = against_file(bench.encoder, bench.wanted.reference)
    else:
        found = against_transformers(bench.encoder)
    require(found)
    note = f"Against {found.against}, over {found.count} texts; the largest difference is {found.difference:.1e}."
    return GateResult(
        f"cosine {found.cosine:.6f} or more to {found.against}",
        {},
        [bench.single("parity", "lowest cosine to the reference", round(found.cosine, 8), "cosine", note)],
        {"against": found.against, "cosine": found.cosine, "difference": found.difference, "texts": found.count},
    )


def quality(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """Every task that is asked for gets a score; what was asked for is said."""
    wanted = bench.wanted
    suites = wanted.suites if wanted.suites or wanted.tasks else ("local",)
    if not wanted.tasks and suites == ("local",) and wanted.data is None:
        raise GateFailed("nothing to measure quality on: --data FOLDER for the suite local, or --task NAME")
    results: Results = evaluate(
        Evaluation(
            models=(f"{wanted.source}?compat={bench.record.compat}&name={wanted.model}",),
            suites=suites,
            tasks=wanted.tasks,
            data=wanted.data,
            output=wanted.output / "evaluation",
            command=wanted.command,
        )
    )
    scores = results.models[0].scores
    if failed := [f"{score.task}: {score.error}" for score in scores if score.error is not None]:
        raise GateFailed(f"{len(failed)} of {len(scores)} tasks failed: {'; '.join(failed)}")
    raw = f"UNMASK_HOME/onboarding/{wanted.output.name}/evaluation/results.json"
    measured = measurements_of(results, wanted.model, wanted.model, by=wanted.by, raw=raw)
    what = " and ".join([*suites, *wanted.tasks])
    mean = sum(score.score or 0.0 for score in scores) / len(scores)
    return GateResult(f"{what}: mean {mean:.2f} over {len(scores)} tasks", {}, measured, {"measured": what})


def speed(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """How fast an engine answers, by length and callers."""
    wanted = bench.wanted
    points = sweep(bench.encoder, wanted.lengths, wanted.callers, wanted.seconds, tell)
    best = _best(points)
    return GateResult(
        f"{best.tokens_per_second:,.0f} tokens/s at best ({best.tokens} tokens, {best.callers} at once)",
        {},
        measurements_of_sweep(points, **bench.provenance("speed")),
        {"points": [vars(point) for point in points]},
    )


def price(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """What a million tokens cost here, by the measured speed, and the price that follows."""
    wanted = bench.wanted
    if wanted.cost_per_hour is None:
        raise GateFailed("what the machine costs is not known: name it with --cost-per-hour DOLLARS")
    points = points_of(bench.measured)
    if not points:
        raise GateFailed("no speed of these weights is on record: run the gate of speed again")
    best = _best(points)
    seconds = Decimal(_MILLION) / Decimal(str(round(best.tokens_per_second, 2)))
    busy = (Decimal(wanted.cost_per_hour) * seconds / _HOUR_S).to_integral_value(ROUND_CEILING)
    proposed = (busy / Decimal(str(wanted.utilisation))).to_integral_value(ROUND_CEILING)
    nano = int(proposed) if wanted.price is None else wanted.price
    said = f"{format_dollars(wanted.cost_per_hour)} dollars an hour, {best.tokens_per_second:,.0f} tokens/s"
    finding = (
        f"a million tokens cost {format_dollars(int(busy))} dollars; proposed {format_dollars(int(proposed))} "
        f"at {wanted.utilisation:.0%} utilisation"
    )
    return GateResult(
        finding if wanted.price is None else f"{finding}; set to {format_dollars(nano)}",
        {"prices": [{"nanodollars_per_million_tokens": nano, "estimated": True}]},
        [bench.single("price", "cost of a million tokens", float(busy) / 1e9, "dollars", f"At {said}, always busy.")],
        {"cost_nanodollars": int(busy), "proposed_nanodollars": int(proposed), "utilisation": wanted.utilisation},
    )


def canary(bench: OnboardingContext, tell: ProgressReporter) -> GateResult:
    """The vector that readiness will ask for is on record, and the model gives it again."""
    text = bench.record.canary.text if bench.record.canary else CANARY_TEXT
    vector = bench.encoder.encode(text)[0]
    # A vector that ships, or that an earlier gate stored for these very weights, is not replaced but tried.
    stored = bench.record.canary or Canary.of(text, vector)
    if (verdict := check_vector(vector, stored.expected())) != "ok":
        raise GateFailed(f"{verdict}: these are not the weights that the record's canary was made with")
    again = cosine(bench.encoder.encode([text, *sample_texts()[:3]])[0], stored.expected())
    return GateResult(
        f"stored, cosine {again:.6f} in a batch",
        {"canary": {"text": stored.text, "vector": stored.vector}},
        [bench.single("canary", "canary, cosine to the stored vector", round(again, 8), "cosine")],
        {"text": text, "cosine": again},
    )


GATES: tuple[Gate, ...] = (
    Gate("licence", lambda bench: bench.wanted.licence or bench.record.licence, licence_and_size),
    Gate("digests", lambda bench: None, digests),
    Gate("load", lambda bench: bench.wanted.replace_specification, loading),
    Gate("parity", lambda bench: _digest(bench.wanted.reference), parity),
    Gate("quality", lambda bench: (bench.wanted.suites, bench.wanted.tasks), quality),
    Gate("speed", lambda bench: (bench.wanted.lengths, bench.wanted.callers, bench.wanted.seconds, machine()), speed),
    Gate(
        "price",
        lambda bench: (bench.wanted.cost_per_hour, bench.wanted.utilisation, bench.wanted.price, _fastest(bench)),
        price,
    ),
    Gate("canary", lambda bench: None, canary),
)


class _Measured:
    """An encoder as `evaluate.cost.load_model` wants to see it."""

    kind = "unmask"

    def __init__(self, encoder: Encoder) -> None:
        self.encode = encoder.encode


def _best(points: Sequence[SpeedPoint]) -> SpeedPoint:
    return max(points, key=lambda point: point.tokens_per_second)


def _fastest(bench: OnboardingContext) -> float | None:
    points = points_of(bench.measured)
    return _best(points).tokens_per_second if points else None


def _digest(file: Path | None) -> str:
    if file is None:
        return ""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _free_memory() -> int | None:
    """Bytes that could still be had; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
