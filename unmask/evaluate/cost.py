"""Cost of vectors: speed of every model on the same texts, in turns, with nothing cached, and sizes."""

import statistics
import time
from collections.abc import Sequence
from importlib.resources import files

from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.evaluate.results import Cost

_ROUNDS = 3


def sample_texts() -> list[str]:
    """Return the texts on which every speed is measured: 40 passages of 5 to 81 words from this project's pages."""
    text = (files("unmask.evaluate") / "speed_sample.txt").read_text(encoding="utf-8")
    return [passage for passage in text.split("\n") if passage]


def measure_cost(models: Sequence[EmbeddingModel], peaks: Sequence[int | None], texts: Sequence[str]) -> list[Cost]:
    """Return the cost of each model; its speed on `texts` is the median of rounds in which the models take turns.

    The speed of a machine drifts. With turns, a disturbance slows all models alike.

    Args:
        models: have encoded `texts` once, which warms them up.
        peaks: memory of each model, see `unmask.evaluate.memory`.
        texts: of `sample_texts`.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(_ROUNDS):
        for model, durations in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.encode(texts)
            durations.append(time.perf_counter() - start)
    return [
        _cost(model, peak, statistics.median(durations), texts)
        for model, peak, durations in zip(models, peaks, seconds, strict=True)
    ]


def _cost(model: EmbeddingModel, peak: int | None, seconds: float, texts: Sequence[str]) -> Cost:
    tokens = model.count_tokens(texts)
    return Cost(
        tokens_per_second=None if tokens is None else tokens / seconds,
        texts_per_second=len(texts) / seconds,
        peak_resident_bytes=peak,
        parameters=model.parameters,
        dimensions=model.dimensions,
        vector_bytes=4 * model.dimensions,
    )
