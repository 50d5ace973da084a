"""Sweep of speeds: throughput and latency of an engine, by length of the texts and number of callers."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

from unmask.catalogue.speed import SpeedPoint
from unmask.encoder import Encoder
from unmask.engine import Engine
from unmask.errors import UsageError
from unmask.evaluate.cost import sample_texts


def sweep(
    encoder: Encoder,
    lengths: Sequence[int],
    callers: Sequence[int],
    seconds: float,
    report_progress: Callable[[int, int], None],
) -> list[SpeedPoint]:
    """Measure every length with every number of callers, through an engine without a cache of vectors.

    Args:
        lengths: in tokens, as near as whole words allow. Lengths beyond the model's maximum are left out.
        report_progress: called with the number of finished points, and of all.

    Raises:
        UsageError: no length fits the model, or a number is below one.
    """
    if min((*lengths, *callers), default=0) < 1 or seconds <= 0:
        raise UsageError("a sweep needs lengths and callers of at least 1, and some seconds")
    fitting = [length for length in lengths if length <= encoder.max_length]
    if not fitting:
        raise UsageError(f"no length of {', '.join(map(str, lengths))} fits the model's {encoder.max_length} tokens")
    engine = Engine(encoder)
    points: list[SpeedPoint] = []
    settings = list(itertools.product(fitting, callers))
    try:
        for done, (length, count) in enumerate(settings):
            report_progress(done, len(settings))
            points.append(asyncio.run(_measure_point(engine, _Texts(encoder, length), length, count, seconds)))
        report_progress(len(settings), len(settings))
    finally:
        engine.close(0)
    return points


class _Texts:
    """Texts of one length in tokens. They repeat only after the whole sample was used."""

    def __init__(self, encoder: Encoder, tokens: int) -> None:
        self._words = " ".join(sample_texts()).split()
        self._at = 0
        sample_tokens = int(encoder.count_tokens(" ".join(self._words[:400]))[0])
        self._count = max(1, round(tokens * 400 / sample_tokens))
        while self._count > 1 and int(encoder.count_tokens(self._text(0))[0]) > tokens:
            self._count -= 1

    def next(self) -> str:
        self._at += 1
        return self._text(self._at)

    def _text(self, at: int) -> str:
        start = at * 7 % len(self._words)
        return " ".join((self._words[start:] + self._words)[: self._count])


async def _measure_point(engine: Engine, texts: _Texts, length: int, count: int, seconds: float) -> SpeedPoint:
    await engine.run(await engine.prepare([texts.next()], truncate=True))
    latencies: list[float] = []
    tokens = 0
    began = time.perf_counter()

    async def caller(number: int) -> None:
        nonlocal tokens
        while True:
            sent = time.perf_counter()
            prompts = await engine.prepare([texts.next()], truncate=True)
            await engine.run(prompts, caller=f"caller {number}")
            now = time.perf_counter()
            latencies.append(1000 * (now - sent))
            tokens += sum(len(prompt.ids) for prompt in prompts)
            if now - began >= seconds:
                return

    await asyncio.gather(*(caller(number) for number in range(count)))
    took = time.perf_counter() - began
    slow = statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0]
    return SpeedPoint(length, count, tokens / took, statistics.median(latencies), slow)
