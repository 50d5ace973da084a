"""What vectors cost: speed and memory of every contender on the same texts, in turns, with nothing cached."""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.evaluate.results import Cost

_ROUNDS = 3


class LoadedModel(NamedTuple):
    """A contender, and the memory that it took to load it and to encode the sample once."""

    contender: EmbeddingModel
    peak_memory_bytes: int | None


def sample_texts() -> list[str]:
    """The texts that every speed is measured on: 40 passages of this project's own documentation, 5 to 81
    words."""
    text = (files("unmask.evaluate") / "speed_sample.txt").read_text(encoding="utf-8")
    return [passage for passage in text.split("\n") if passage]


def load_model(open_model: Callable[[], EmbeddingModel], texts: Sequence[str]) -> LoadedModel:
    """Open a contender and encode `texts` once, which also warms it up.

    Its memory is the process's peak meanwhile above what the process had before. Memory that an earlier contender has
    given back is not seen, so contenders stay open as long as the run.
    """
    before = _status("VmRSS")
    _forget_peak()
    contender = open_model()
    contender.encode(texts)
    peak = _status("VmHWM")
    remote = contender.kind == "endpoint"
    return LoadedModel(contender, None if remote or before is None or peak is None else max(0, peak - before))


def measure_cost(loaded: Sequence[LoadedModel], texts: Sequence[str]) -> list[Cost]:
    """Speed of each contender on `texts`, the median of rounds in which they take turns.

    Turns, because a machine's speed drifts: what disturbs one contender disturbs all.
    """
    seconds: list[list[float]] = [[] for _ in loaded]
    for _ in range(_ROUNDS):
        for contender, spent in zip((item.contender for item in loaded), seconds, strict=True):
            began = time.perf_counter()
            contender.encode(texts)
            spent.append(time.perf_counter() - began)
    return [_cost(item, statistics.median(spent), texts) for item, spent in zip(loaded, seconds, strict=True)]


def _cost(item: LoadedModel, seconds: float, texts: Sequence[str]) -> Cost:
    contender = item.contender
    tokens = contender.count_tokens(texts)
    return Cost(
        tokens_per_second=None if tokens is None else tokens / seconds,
        texts_per_second=len(texts) / seconds,
        peak_memory_bytes=item.peak_memory_bytes,
        parameters=contender.parameters,
        dimensions=contender.dimensions,
        vector_bytes=4 * contender.dimensions,
    )


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM
    except OSError:
        return


def _status(field: str) -> int | None:
    """A figure of this process in bytes; None where the system does not keep it there, as off Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
