"""The fastest precision of this machine that keeps a model's vectors: what `dtype="auto"` becomes.

A precision is measured once for a model on a machine and then kept under UNMASK_HOME. It may be chosen if the vectors
of 64 texts stay near those of float32. Its speed is measured for all texts together and for one alone, since a server
has both: one text is bound by reading weights, many by multiplying.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import torch

from unmask.disk import atomic_write
from unmask.encoder.runtime import kernels
from unmask.errors import StorageError, UsageError
from unmask.home import home

log = logging.getLogger("unmask")

# Largest 1 - cosine to float32 that any of the texts may have.
MAX_DISTANCE = 1e-4
_ROUNDS = 3
_SINGLE_TEXT_CALLS = 9


class TextEncoder(Protocol):
    """The part of an `Encoder` that is measured."""

    def encode(self, texts: list[str], *, normalize: bool = False) -> np.ndarray:
        """Vectors of texts, float32 [n, dim]."""
        ...


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and why it was chosen.

    Attributes:
        dtype: name of the precision, as for `Encoder.load`.
        reason: one sentence with the figures of every precision that was measured.
    """

    dtype: str
    reason: str


def fastest_precision(revision: str, device: str, load: Callable[[str], TextEncoder]) -> PrecisionChoice:
    """The fastest precision whose vectors stay within MAX_DISTANCE of float32; float32 if there is none.

    The first call for a model on a machine loads it in every precision, at most two at a time, and takes seconds.
    Later calls read the result.

    Args:
        revision: of the model's weights.
        device: torch device that it will run on.
        load: loads the model in a precision. A UsageError means that this machine cannot compute it.
    """
    machine = _machine(device)
    digest = hashlib.sha256(json.dumps([revision, machine]).encode()).hexdigest()[:16]
    file = home() / "precision" / f"{digest}.json"
    choice = _read(file)
    if choice is None:
        choice = _measure(load, ("bfloat16", "int8") if device.startswith("cpu") else ("bfloat16", "float16"))
        log.info("precision of %s on %s: %s. %s", revision, device, choice.dtype, choice.reason)
        try:
            with atomic_write(file) as partial:
                partial.write_text(json.dumps({**asdict(choice), "revision": revision, "machine": machine}))
        except StorageError as error:
            log.warning("the choice of precision is not kept, and is measured again at the next start: %s", error)
    return choice


@cache
def texts() -> list[str]:
    """The 64 texts that precisions are compared on: words, questions, code, several languages, long sentences."""
    file = Path(__file__).with_name("precision_texts.txt")
    return file.read_text(encoding="utf-8").splitlines()


def _machine(device: str) -> dict[str, str | int]:
    """Everything besides the weights that decides the speeds."""
    library = kernels.library()
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability() + (" AMX" if kernels.has_amx() else ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": "none" if library is None else Path(library._name).stem,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else platform.processor()


def _read(file: Path) -> PrecisionChoice | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return PrecisionChoice(str(values["dtype"]), str(values["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(load: Callable[[str], TextEncoder], candidates: tuple[str, ...]) -> PrecisionChoice:
    exact = load("float32")
    expected = exact.encode(texts(), normalize=True)
    best, share, findings = "float32", 1.0, []
    for dtype in candidates:
        try:
            candidate = load(dtype)
        except UsageError as error:
            findings.append(f"{dtype}: {error}")
            continue
        distance = float((1 - (candidate.encode(texts(), normalize=True) * expected).sum(axis=1)).max())
        if not distance <= MAX_DISTANCE:  # a NaN is too far as well
            findings.append(f"{dtype}: a vector is {distance:.1e} off, {MAX_DISTANCE:.0e} is allowed")
            continue
        together, alone = _time_shares(candidate, exact)
        findings.append(
            f"{dtype}: {len(texts())} texts take {together:.0%} and one text {alone:.0%} of float32's time, "
            f"vectors at most {distance:.1e} off"
        )
        if (both := (together * alone) ** 0.5) < share:
            best, share = dtype, both
    return PrecisionChoice(best, "; ".join(findings))


def _time_shares(candidate: TextEncoder, exact: TextEncoder) -> tuple[float, float]:
    """Time of a candidate over that of float32, interleaved: for all texts together, and for one alone."""

    def share(batch: list[str], calls: int) -> float:
        times: list[tuple[float, float]] = []
        for _ in range(calls):
            start = time.perf_counter()
            exact.encode(batch)
            middle = time.perf_counter()
            candidate.encode(batch)
            times.append((middle - start, time.perf_counter() - middle))
        first, second = (median(each) for each in zip(*times, strict=True))
        return second / first

    share(texts()[:1], 1)  # warm both
    return share(texts(), _ROUNDS), share(texts()[:1], _SINGLE_TEXT_CALLS)
