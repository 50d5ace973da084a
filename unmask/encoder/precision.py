"""The fastest precision of this machine that keeps a model's vectors: what `dtype="auto"` becomes.

A precision is measured once for a model on a machine and then kept under UNMASK_HOME. It may be chosen if the vectors
of 64 texts stay near those of float32. Its speed is measured for many of them together and for one alone, since a
server has both: one text is bound by reading weights, many by multiplying.

The rule: of the precisions that are near enough, and that take at most 3 % longer than float32 for many texts and for
one, the one with the smallest geometric mean of both times, if that is at most 95 % of float32's. A processor whose
speed changes between the measurements can still mislead it. int8 is not among them: its vectors are further off than
the bound (its own tolerance is a cosine of 0.99).
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Protocol, TypeVar

import numpy as np
import torch

from unmask.disk import atomic_write, locked_where_possible
from unmask.encoder.precision_choices import PrecisionChoice, choices_folder, processor_name, read_choice
from unmask.encoder.runtime import kernels
from unmask.errors import StorageError, UsageError

log = logging.getLogger("unmask")

# Largest 1 - cosine to float32 that any of the texts may have.
MAX_DISTANCE = 1e-4
# Shares of float32's time: the most that many texts or one may take, and that both may take on average.
MAX_SHARE = 1.03
MAX_MEAN_SHARE = 0.95
# Fewer weights are in the cache anyway, and their times are too short to tell apart.
_FEW_WEIGHTS = 4_000_000
# Many texts are every third of the 64: each pair of timings is then short enough for several of them.
_TIMED_EVERY = 3
# Pairs of timings, one precision after the other, are repeated until this much time has passed.
_SECONDS = 2.0
_LEAST_PAIRS = 5
_SINGLE_TEXT_CALLS = 5
_WARM_UP_TEXTS = 8


class TextEncoder(Protocol):
    """The part of an `Encoder` that is measured."""

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        ...

    @property
    def bits_per_weight(self) -> int:
        """Bits in which the linear layers keep a weight."""
        ...

    def encode(self, texts: list[str], *, normalize: bool = False) -> np.ndarray:
        """Return the vectors of texts, float32 [n, dim]."""
        ...


_Encoder = TypeVar("_Encoder", bound=TextEncoder)


def load_fastest(
    name: str, identity: str, device: str, load: Callable[[str], _Encoder]
) -> tuple[_Encoder, PrecisionChoice]:
    """Load a model in its fastest precision whose vectors stay within MAX_DISTANCE of float32; else in float32.

    The first call for a model on a machine loads it in float32 and in every other precision, and measures. Later calls
    read the result. Of several processes one measures, and the others wait for it.

    Args:
        name: the model's, for people who read the kept choices.
        identity: its revision and everything else that decides its vectors.
        device: torch device that it will run on.
        load: loads the model in a precision. A UsageError means that this machine cannot compute it.
    """
    machine = _machine(device)
    digest = hashlib.sha256(json.dumps([identity, machine]).encode()).hexdigest()[:16]
    file = choices_folder() / f"{digest}.json"
    choice = read_choice(file)
    if choice is not None:
        return load(choice.dtype), choice
    exact = load("float32")
    if (reason := _nothing_to_gain(exact)) is not None:
        return exact, PrecisionChoice("float32", reason)
    with locked_where_possible(file.with_suffix(".lock")):
        choice = read_choice(file)
        if choice is not None:
            return load(choice.dtype), choice
        candidates = ("bfloat16",) if device.startswith("cpu") else ("bfloat16", "float16")
        encoder, choice = _measure(exact, load, candidates)
        log.info("precision of %s on %s: %s. %s", name, device, choice.dtype, choice.reason)
        try:
            with atomic_write(file) as partial:
                values = {**asdict(choice), "model": name, "identity": identity, "machine": machine}
                partial.write_text(json.dumps(values))
        except StorageError as error:
            log.warning("the choice of precision is not kept, and is measured again at the next start: %s", error)
    return encoder, choice


@cache
def texts() -> list[str]:
    """Return the 64 texts to compare precisions on: words, questions, code, several languages, long sentences."""
    file = Path(__file__).with_name("precision_texts.txt")
    return file.read_text(encoding="utf-8").splitlines()


def _machine(device: str) -> dict[str, str | int]:
    """Return everything besides the weights that decides the speeds."""
    library = kernels.library()
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability() + (" AMX" if kernels.has_amx() else ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": "none" if library is None else Path(library._name).stem,
    }


def _nothing_to_gain(exact: TextEncoder) -> str | None:
    """Return the reason for which no other precision need be measured beside float32; None if there is none."""
    if exact.num_parameters < _FEW_WEIGHTS:
        return f"the model has only {exact.num_parameters:,} weights: no other precision would gain time"
    if exact.bits_per_weight <= 16 and not kernels.has_amx():
        return f"float32 keeps every number of its linear layers in {exact.bits_per_weight} bits"
    return None


def _measure(
    exact: _Encoder, load: Callable[[str], _Encoder], candidates: tuple[str, ...]
) -> tuple[_Encoder, PrecisionChoice]:
    exact.encode(texts()[:_WARM_UP_TEXTS])
    expected = exact.encode(texts(), normalize=True)
    best, least, findings = (exact, "float32"), MAX_MEAN_SHARE, []
    for dtype in candidates:
        try:
            candidate = load(dtype)
        except UsageError as error:
            findings.append(f"{dtype}: {error}")
            continue
        distance = _distance(candidate.encode(texts(), normalize=True), expected)
        if not distance <= MAX_DISTANCE:  # a NaN is too far as well
            findings.append(f"{dtype}: a vector is {distance:.1e} off, {MAX_DISTANCE:.0e} is allowed")
            continue
        together, alone = _time_shares(candidate, exact)
        findings.append(
            f"{dtype}: many texts take {together:.0%} and one text {alone:.0%} of float32's time, "
            f"vectors at most {distance:.1e} off"
        )
        mean = (together * alone) ** 0.5
        if max(together, alone) <= MAX_SHARE and mean <= least:
            best, least = (candidate, dtype), mean
    return best[0], PrecisionChoice(best[1], "; ".join(findings))


def _distance(vectors: np.ndarray, expected: np.ndarray) -> float:
    """Largest 1 - cosine of unit vectors [n, dim], as half a squared distance: 1 minus a cosine loses its digits."""
    return float(((vectors.astype(np.float64) - expected) ** 2).sum(axis=1).max() / 2)


def _time_shares(candidate: TextEncoder, exact: TextEncoder) -> tuple[float, float]:
    """Return the time of a candidate over that of float32: for many texts together, and for one alone.

    Each ratio is of two times that follow one another, in alternating order, and the median of all ratios counts:
    processors change their speed from second to second, by more than the precisions differ.
    """
    many = texts()[::_TIMED_EVERY]
    ratios: dict[int, list[float]] = {1: [], len(many): []}
    end = time.perf_counter() + _SECONDS
    while len(ratios[len(many)]) < _LEAST_PAIRS or time.perf_counter() < end:
        for batch, calls in ((many[:1], _SINGLE_TEXT_CALLS), (many, 1)):
            for _ in range(calls):
                order = (exact, candidate) if len(ratios[len(batch)]) % 2 else (candidate, exact)
                times = {encoder: _time(encoder, batch) for encoder in order}
                ratios[len(batch)].append(times[candidate] / times[exact])
    return median(ratios[len(many)]), median(ratios[1])


def _time(encoder: TextEncoder, batch: list[str]) -> float:
    start = time.perf_counter()
    encoder.encode(batch)
    return time.perf_counter() - start
