"""Cost of vectors: speed and memory of every model on the same texts, in turns, with nothing cached."""

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, TypeVar

from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.evaluate.results import Cost

T = TypeVar("T")

_ROUNDS = 3


class LoadedModel(NamedTuple):
    """A model, and the memory that it took to load it and to encode the sample once."""

    model: EmbeddingModel
    peak_memory_bytes: int | None


def sample_texts() -> list[str]:
    """Return the texts on which every speed is measured: 40 passages of 5 to 81 words from this project's pages."""
    text = (files("unmask.evaluate") / "speed_sample.txt").read_text(encoding="utf-8")
    return [passage for passage in text.split("\n") if passage]


def load_model(open_model: Callable[[], EmbeddingModel], texts: Sequence[str]) -> LoadedModel:
    """Open a model and encode `texts` once, which also warms it up.

    Memory that an earlier model has given back would hide some of it, so all models stay open as long as the run.
    """

    def open_and_encode() -> EmbeddingModel:
        model = open_model()
        model.encode(texts)
        return model

    model, peak_memory = measure_peak_memory(open_and_encode)
    return LoadedModel(model, None if model.kind == "endpoint" else peak_memory)


def measure_peak_memory(work: Callable[[], T]) -> tuple[T, int | None]:
    """Run `work`, and return its result with the bytes of memory that it took.

    The memory is the peak of the process during the work minus its memory before. None where the system does not
    keep these figures, as off Linux.
    """
    before = _process_status("VmRSS")
    _reset_peak_memory()
    result = work()
    peak = _process_status("VmHWM")
    return result, None if before is None or peak is None else max(0, peak - before)


def measure_cost(loaded_models: Sequence[LoadedModel], texts: Sequence[str]) -> list[Cost]:
    """Return the cost of each model; its speed on `texts` is the median of rounds in which the models take turns.

    The speed of a machine drifts. With turns, a disturbance slows all models alike.
    """
    seconds: list[list[float]] = [[] for _ in loaded_models]
    for _ in range(_ROUNDS):
        for loaded, durations in zip(loaded_models, seconds, strict=True):
            start = time.perf_counter()
            loaded.model.encode(texts)
            durations.append(time.perf_counter() - start)
    return [
        _cost(loaded, statistics.median(durations), texts)
        for loaded, durations in zip(loaded_models, seconds, strict=True)
    ]


def _cost(loaded: LoadedModel, seconds: float, texts: Sequence[str]) -> Cost:
    model = loaded.model
    tokens = model.count_tokens(texts)
    return Cost(
        tokens_per_second=None if tokens is None else tokens / seconds,
        texts_per_second=len(texts) / seconds,
        peak_memory_bytes=loaded.peak_memory_bytes,
        parameters=model.parameters,
        dimensions=model.dimensions,
        vector_bytes=4 * model.dimensions,
    )


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM
    except OSError:
        return


def _process_status(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None where there is none, as off Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
