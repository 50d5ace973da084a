"""How fast an engine answers, by the length of the texts and the number of callers."""

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

DEFAULT_LENGTHS, DEFAULT_CALLERS = (16, 64, 256), (1, 4, 16)


def sweep(
    encoder: Encoder,
    lengths: Sequence[int],
    callers: Sequence[int],
    seconds: float,
    tell: Callable[[int, int], None],
) -> list[SpeedPoint]:
    """Every length with every number of callers, for some seconds each, through an engine that remembers nothing.

    Args:
        lengths: in tokens, as near as whole words allow; those beyond the model's own are left out.
        tell: is told how many points are done, of how many.

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
    places = list(itertools.product(fitting, callers))
    try:
        for done, (length, count) in enumerate(places):
            tell(done, len(places))
            points.append(asyncio.run(_measured(engine, _Texts(encoder, length), length, count, seconds)))
        tell(len(places), len(places))
    finally:
        engine.close(0)
    return points


class _Texts:
    """Texts of one length in tokens, no two alike before the sample has been gone through."""

    def __init__(self, encoder: Encoder, tokens: int) -> None:
        self._words = " ".join(sample_texts()).split()
        self._at = 0
        whole = int(encoder.count_tokens(" ".join(self._words[:400]))[0])
        self._count = max(1, round(tokens * 400 / whole))
        while self._count > 1 and int(encoder.count_tokens(self._text(0))[0]) > tokens:
            self._count -= 1

    def next(self) -> str:
        self._at += 1
        return self._text(self._at)

    def _text(self, at: int) -> str:
        start = at * 7 % len(self._words)
        return " ".join((self._words[start:] + self._words)[: self._count])


async def _measured(engine: Engine, texts: _Texts, length: int, count: int, seconds: float) -> SpeedPoint:
    await engine.run(await engine.prepare([texts.next()], truncate=True))
    latencies: list[float] = []
    tokens = 0
    began = time.perf_counter()

    async def caller(number: int) -> None:
        nonlocal tokens
        while True:
            asked = time.perf_counter()
            prompts = await engine.prepare([texts.next()], truncate=True)
            await engine.run(prompts, caller=f"caller {number}")
            now = time.perf_counter()
            latencies.append(1000 * (now - asked))
            tokens += sum(len(prompt.ids) for prompt in prompts)
            if now - began >= seconds:
                return

    await asyncio.gather(*(caller(number) for number in range(count)))
    took = time.perf_counter() - began
    slow = statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0]
    return SpeedPoint(length, count, tokens / took, statistics.median(latencies), slow)
