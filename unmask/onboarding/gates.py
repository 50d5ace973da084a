"""The gates between a requested model and a live one. Each measures, and refuses a model that is not in order.

A gate is a function of an `OnboardingContext` that returns a `GateResult`, or raises one of our errors where the model
does not pass. It declares in `needs` which gates must have passed before it.
"""

import contextlib
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unmask.accounts.money import format_dollars
from unmask.catalogue.canary import CANARY_TEXT, check_vector, cosine, expected_vector, make_canary
from unmask.catalogue.measurement import COST, ONBOARDING, PEAK_MEMORY, SPEED, Measurement, measurements_of
from unmask.catalogue.record import Record
from unmask.catalogue.speed import SpeedPoint, measurements_of_sweep, points_of
from unmask.checkpoint import Checkpoint
from unmask.checkpoint.digest import file_sha256
from unmask.encoder import Encoder
from unmask.errors import GateFailed
from unmask.evaluate.cost import sample_texts
from unmask.evaluate.memory import MemoryUnknown, measure_memory
from unmask.evaluate.results import Results
from unmask.evaluate.run import Evaluation, machine, run_evaluation
from unmask.onboarding.options import OnboardingOptions
from unmask.onboarding.parity import Parity, against_file, against_transformers, require
from unmask.onboarding.sweep import sweep

log = logging.getLogger("unmask")

ProgressReporter = Callable[[int, int], None]

_HOUR_S = 3600
_MILLION = 1_000_000


@dataclass(frozen=True)
class GateResult:
    """The result of a gate that was passed.

    Attributes:
        finding: one sentence.
        fields: fields of the record that the gate sets.
        measurements: with their provenance.
        raw: content of the raw file.
    """

    finding: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    measurements: Sequence[Measurement] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class OnboardingContext:
    """The model on its way through the gates. Its weights are loaded once, and only if a gate needs them.

    Attributes:
        options: the model, and the settings of its gates.
        record: of the model, with the fields that earlier gates set.
        checkpoint: the model's files.
        measurements: those of these weights by earlier gates, of this run or another one.
    """

    options: OnboardingOptions
    record: Record
    checkpoint: Checkpoint
    measurements: Sequence[Measurement]

    @cached_property
    def encoder(self) -> Encoder:
        """The model in float32, loaded on first use: what its vectors are compared in."""
        return Encoder.load(self.options.source, compat=self.record.compat, dtype="float32")

    @cached_property
    def served_encoder(self) -> Encoder:
        """The model in the precision that a server on this machine chooses, loaded on first use."""
        return Encoder.load(self.options.source, compat=self.record.compat)

    @cached_property
    def peak_memory(self) -> int | None:
        """Memory of a process that loads the model in float32 and encodes, measured once; None where it is unknown."""
        options = {"dtype": "float32", "compat": self.record.compat}
        try:
            return measure_memory(f"unmask:{self.options.source}", options, sample_texts())
        except MemoryUnknown as error:
            log.warning("the memory of %s stays unknown: %s", self.options.model, error)
            return None

    def provenance(self, gate: str) -> dict[str, Any]:
        """Return the fields that all measurements of a gate share."""
        return {
            "model": self.options.model,
            "origin": "measured",
            "by": self.options.by,
            "on": datetime.now(UTC).date(),
            "revision": self.checkpoint.revision,
            "hardware": machine(),
            "command": self.options.command,
            # Relative to UNMASK_HOME: the page must not show folders of this machine.
            "raw": f"UNMASK_HOME/onboarding/{self.options.output.name}/{gate}.json",
        }

    def measurement(self, gate: str, what: str, value: float, unit: str, note: str = "") -> Measurement:
        """Return a gate's value as a measurement of the group "onboarding"."""
        return Measurement(group=ONBOARDING, what=what, value=value, unit=unit, note=note, **self.provenance(gate))


@dataclass(frozen=True)
class Gate:
    """One check that a model must pass on its way to live.

    Attributes:
        name: out of `lifecycle.GATE_NAMES`.
        settings: the settings that decide its outcome beside the weights. It is run again when they change.
        run: measures, see the top of this file.
        needs: names of the gates that must have passed before.
    """

    name: str
    settings: Callable[[OnboardingContext], object]
    run: Callable[[OnboardingContext, ProgressReporter], GateResult]
    needs: tuple[str, ...] = ()

    def fingerprint(self, context: OnboardingContext) -> str:
        """Return 16 hex digits over the weights, the mode and the settings of the gate."""
        words = f"{context.checkpoint.revision} {context.record.compat} {self.settings(context)!r}"
        return hashlib.sha256(words.encode()).hexdigest()[:16]


def check_licence_and_size(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Check that the licence of the weights is known, and that this machine can hold them."""
    licence = context.options.licence or context.record.licence
    if not licence:
        raise GateFailed("nobody says under which licence the weights are: read their card, and name it with --licence")
    files = context.checkpoint.files
    size = sum(file.stat().st_size for file in files)
    tensors = context.checkpoint.tensors
    needed = 4 * sum(math.prod(tensors.shape(name)) for name in tensors.names())
    free = _free_memory()
    if free is not None and needed > free:
        raise GateFailed(
            f"the weights take {needed / 1e9:.1f} GB in float32 and {free / 1e9:.1f} GB are free: use a larger machine"
        )
    base = context.record.base_licence
    base_note = f", base {base}" if base and base != licence else ""
    if context.record.base and not base:
        base_note = "; the licence of its base is not on record"
    return GateResult(
        f"{licence}{base_note}; {size / 1e6:,.1f} MB in {len(files)} files, {needed / 1e6:,.1f} MB in memory",
        {"licence": licence},
        [context.measurement("licence", "size of the files", size, "bytes")],
        {"licence": licence, "base_licence": base, "bytes": size, "bytes_in_memory": needed},
    )


def digest_files(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Digest every file that decides a vector. Refuses other weights under the name of a model that answers."""
    answering = context.record.status in ("live", "deprecated")
    earlier = context.record.revision
    if answering and earlier is not None and earlier != context.checkpoint.revision:
        raise GateFailed(
            f"the weights {earlier} are live and these are {context.checkpoint.revision}: vectors of the two do not "
            "mix. Retire the model first, or give the new weights a name of their own"
        )
    file_digests = {}
    for done, file in enumerate(context.checkpoint.files):
        report_progress(done, len(context.checkpoint.files))
        file_digests[f"{file.parent.name}/{file.name}"] = file_sha256(file).hex()
    fields: dict[str, Any] = {"revision": context.checkpoint.revision}
    if earlier != context.checkpoint.revision:
        # Another revision's canary would refuse these weights. The shipped one is for the shipped weights.
        fields["canary"] = None
    return GateResult(
        f"revision {context.checkpoint.revision} over {len(file_digests)} files",
        fields,
        [context.measurement("digests", "files with a digest", len(file_digests), "files")],
        {"sha256": file_digests},
    )


def load_weights(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Load the weights, encode texts, and compare the specification of the weights with the record's."""

    began = time.perf_counter()
    encoder = context.encoder
    load_s = time.perf_counter() - began
    if not np.isfinite(encoder.encode(CANARY_TEXT)).all():
        raise GateFailed("the model gives a vector with numbers that are not finite: its weights are damaged")
    specification = {
        "parameters": encoder.num_parameters,
        "dimensions": encoder.dim,
        "max_tokens": encoder.max_length,
        "pooling": encoder.pooling,
        "architecture": str(encoder.checkpoint.config.get("model_type")),
    }
    measurements = [context.measurement("load", "time to load", round(load_s, 3), "s")]
    if context.peak_memory is not None:
        shared = context.provenance("load")
        measurements.append(
            Measurement(group=COST, what=PEAK_MEMORY, value=context.peak_memory, unit="bytes", **shared)
        )
    parameters, dimensions = specification["parameters"], specification["dimensions"]
    return GateResult(
        f"{load_s:.1f} s; {parameters:,} parameters, {dimensions} dimensions",
        _specification_fields(context, specification),
        measurements,
        specification,
    )


def _specification_fields(context: OnboardingContext, specification: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that bring the record to the specification of the weights.

    Raises:
        GateFailed: the record says something else, and the operator has not asked to replace it.
    """
    recorded = {name: getattr(context.record, name) for name in specification}
    differing = [name for name, value in specification.items() if recorded[name] not in (None, value)]
    if differing and not context.options.replace_specification:
        text = ", ".join(f"{name} {specification[name]} instead of {recorded[name]}" for name in differing)
        raise GateFailed(
            f"the weights are not what the record describes: {text}. Name the right ones, or pass "
            "--replace-specification if the record is what is wrong"
        )
    fields: dict[str, Any] = {name: value for name, value in specification.items() if recorded[name] != value}
    if differing:
        note = "Specifications taken from the weights: " + ", ".join(
            f"{name} {recorded[name]} -> {specification[name]}" for name in differing
        )
        fields["changes"] = [
            *({"on": change.on.isoformat(), "note": change.note} for change in context.record.changes),
            {"on": datetime.now(UTC).date().isoformat(), "note": f"{note}."},
        ]
    return fields


def compare_with_reference(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Compare the model's vectors with those of the reference file, or of transformers."""
    if context.options.reference is not None:
        parity: Parity = against_file(context.encoder, context.options.reference)
    else:
        parity = against_transformers(context.encoder)
    require(parity)
    note = f"Against {parity.against}, over {parity.count} texts; the largest difference is {parity.difference:.1e}."
    return GateResult(
        f"cosine {parity.cosine:.6f} or more to {parity.against}",
        {},
        [context.measurement("parity", "lowest cosine to the reference", round(parity.cosine, 8), "cosine", note)],
        {"against": parity.against, "cosine": parity.cosine, "difference": parity.difference, "texts": parity.count},
    )


def measure_quality(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Evaluate the model on the suites and tasks of the options. Every task must get a score."""
    options = context.options
    suites = options.suites if options.suites or options.tasks else ("local",)
    if not options.tasks and suites == ("local",) and options.data is None:
        raise GateFailed("nothing to measure quality on: --data FOLDER for the suite local, or --task NAME")
    specification = f"{options.source}?compat={context.record.compat}&name={options.model}"
    results: Results = run_evaluation(
        Evaluation(
            models=(specification,),
            # The gate "load" measured it: a large model is not loaded once more for the same figure.
            peaks={specification: context.peak_memory},
            suites=suites,
            tasks=options.tasks,
            data=options.data,
            defaults={"dtype": "float32"},
            output=options.output / "evaluation",
            command=options.command,
        )
    )
    scores = results.models[0].scores
    if failed := [f"{score.task}: {score.error}" for score in scores if score.error is not None]:
        raise GateFailed(f"{len(failed)} of {len(scores)} tasks failed: {'; '.join(failed)}")
    raw = f"UNMASK_HOME/onboarding/{options.output.name}/evaluation/results.json"
    measurements = measurements_of(results, options.model, options.model, by=options.by, raw=raw)
    scope = " and ".join([*suites, *options.tasks])
    mean = sum(score.score or 0.0 for score in scores) / len(scores)
    return GateResult(f"{scope}: mean {mean:.2f} over {len(scores)} tasks", {}, measurements, {"measured": scope})


def measure_speed(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Measure the throughput and latency of an engine, by length of the texts and number of callers."""
    options = context.options
    points = sweep(context.served_encoder, options.lengths, options.callers, options.seconds, report_progress)
    best, precision = _fastest_point(points), context.served_encoder.dtype_choice.dtype
    return GateResult(
        f"{best.tokens_per_second:,.0f} tokens/s at best ({best.tokens} tokens, {best.callers} at once, {precision})",
        {},
        measurements_of_sweep(points, note=f"In {precision}.", **context.provenance("speed")),
        {"points": [vars(point) for point in points], "precision": precision},
    )


def propose_price(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Propose a price per million tokens, from the measured speed and the cost of the machine."""
    options = context.options
    if options.cost_per_hour is None:
        raise GateFailed("what the machine costs is not known: name it with --cost-per-hour DOLLARS")
    points = points_of(context.measurements)
    if not points:
        raise GateFailed("no speed of these weights is on record: run the gate of speed again")
    best = _fastest_point(points)
    seconds = Decimal(_MILLION) / Decimal(str(round(best.tokens_per_second, 2)))
    cost = (Decimal(options.cost_per_hour) * seconds / _HOUR_S).to_integral_value(ROUND_CEILING)
    proposed = (cost / Decimal(str(options.utilisation))).to_integral_value(ROUND_CEILING)
    nano = int(proposed) if options.price is None else options.price
    basis = f"{format_dollars(options.cost_per_hour)} dollars an hour, {best.tokens_per_second:,.0f} tokens/s"
    finding = (
        f"a million tokens cost {format_dollars(int(cost))} dollars; proposed {format_dollars(int(proposed))} "
        f"at {options.utilisation:.0%} utilisation"
    )
    precision = next(m.note for m in context.measurements if m.group == SPEED)
    note = f"At {basis}, always busy. {precision}"
    return GateResult(
        finding if options.price is None else f"{finding}; set to {format_dollars(nano)}",
        {"prices": [{"nanodollars_per_million_tokens": nano, "estimated": True}]},
        [context.measurement("price", "cost of a million tokens", float(cost) / 1e9, "dollars", note)],
        {"cost_nanodollars": int(cost), "proposed_nanodollars": int(proposed), "utilisation": options.utilisation},
    )


def store_canary(context: OnboardingContext, report_progress: ProgressReporter) -> GateResult:
    """Store the canary vector that the readiness probe compares with, and check that the model gives it again."""
    text = context.record.canary.text if context.record.canary else CANARY_TEXT
    vector = context.encoder.encode(text)[0]
    # A vector that ships, or that an earlier gate stored for these weights, is checked and not replaced.
    stored = context.record.canary or make_canary(text, vector)
    if (verdict := check_vector(vector, expected_vector(stored))) != "ok":
        raise GateFailed(f"{verdict}: these are not the weights that the record's canary was made with")
    in_batch = cosine(context.encoder.encode([text, *sample_texts()[:3]])[0], expected_vector(stored))
    return GateResult(
        f"stored, cosine {in_batch:.6f} in a batch",
        {"canary": {"text": stored.text, "vector": stored.vector}},
        [context.measurement("canary", "canary, cosine to the stored vector", round(in_batch, 8), "cosine")],
        {"text": text, "cosine": in_batch},
    )


# The gates that use the encoder need "load": it measures the time and memory of the first load.
GATES: tuple[Gate, ...] = (
    Gate("licence", lambda context: context.options.licence or context.record.licence, check_licence_and_size),
    Gate("digests", lambda context: None, digest_files),
    Gate("load", lambda context: context.options.replace_specification, load_weights),
    Gate("parity", lambda context: _file_digest(context.options.reference), compare_with_reference, needs=("load",)),
    Gate("quality", lambda context: (context.options.suites, context.options.tasks), measure_quality, needs=("load",)),
    Gate(
        "speed",
        lambda context: (context.options.lengths, context.options.callers, context.options.seconds, machine()),
        measure_speed,
        needs=("load",),
    ),
    Gate(
        "price",
        lambda context: (
            context.options.cost_per_hour,
            context.options.utilisation,
            context.options.price,
            _best_throughput(context),
        ),
        propose_price,
        needs=("speed",),
    ),
    # "digests" takes the canary of other weights off the record.
    Gate("canary", lambda context: None, store_canary, needs=("digests", "load")),
)


def in_order_of_needs(gates: Sequence[Gate]) -> list[Gate]:
    """Return the gates so that each comes after those it needs, otherwise in the order given.

    Raises:
        ValueError: a gate needs one that is not there, or gates need each other.
    """
    waiting, ordered = list(gates), list[Gate]()
    while waiting:
        passed = {gate.name for gate in ordered}
        following = next((gate for gate in waiting if passed.issuperset(gate.needs)), None)
        if following is None:
            raise ValueError(f"the needs of {', '.join(gate.name for gate in waiting)} cannot be met")
        waiting.remove(following)
        ordered.append(following)
    return ordered


def _fastest_point(points: Sequence[SpeedPoint]) -> SpeedPoint:
    return max(points, key=lambda point: point.tokens_per_second)


def _best_throughput(context: OnboardingContext) -> float | None:
    """Return the highest tokens per second that was measured; None before the gate of speed."""
    points = points_of(context.measurements)
    return _fastest_point(points).tokens_per_second if points else None


def _file_digest(file: Path | None) -> str:
    return "" if file is None else file_sha256(file).hex()


def _free_memory() -> int | None:
    """Return the bytes of memory that are free; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
