"""`HandThread`: state of one hand of an engine: the running forward, the measured speed, the losses."""

import threading
from dataclasses import dataclass, field

from unmask.engine.hand import Hand, HandState
from unmask.engine.queue import QueuedPrompt

# Smaller forwards measure overhead rather than speed. Until a larger one has run, no request is refused by deadline.
_MIN_MEASURED_TOKENS = 256
# A forward is late after this many times the time that it should take, and never before the second number of seconds.
# Without a measured speed, the third counts.
_LATE_TIMES, _MIN_LATE_S, _UNMEASURED_LATE_S = 3.0, 1.0, 30.0


@dataclass(frozen=True)
class HandFigures:
    """A hand of an engine, as pages and metrics show it.

    Attributes:
        name, state: see `Hand`.
        tokens_per_second: measured speed; None until it is known.
        forwards: number of forwards by outcome: "done", "late" or "lost".
    """

    name: str
    state: HandState
    tokens_per_second: float | None
    forwards: dict[str, int]


@dataclass(eq=False)
class HandThread:
    """A thread of the engine, and its hand. The engine's lock guards it.

    Attributes:
        number: of the hand, from 0. Hands with higher numbers are parked first.
        tokens_per_second: measured speed, a moving average; None until a large forward has run.
        taken: prompts of the running forward.
        last_end: `time.perf_counter()` at which the last forward, or the last wait for work, ended.
        forwards, times_late, times_lost: number of forwards that ended well, were late, or lost their hand.
    """

    hand: Hand
    number: int = 0
    thread: threading.Thread | None = None
    tokens_per_second: float | None = None
    taken: list[QueuedPrompt] = field(default_factory=list)
    last_end: float = 0.0
    forwards: int = 0
    times_late: int = 0
    times_lost: int = 0

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the running forward."""
        return sum(queued.length for queued in self.taken)

    @property
    def rate(self) -> float | None:
        """Return the measured speed, or the one that the hand had at its start."""
        return self.tokens_per_second or self.hand.tokens_per_second

    def figures(self) -> HandFigures:
        """Return the figures for pages and metrics."""
        forwards = {"done": self.forwards, "late": self.times_late, "lost": self.times_lost}
        return HandFigures(self.hand.name, self.hand.state, self.rate, forwards)

    def seconds_until_late(self) -> float:
        """Return the time limit of the running forward. Each earlier delay of one of its prompts doubles it."""
        rate = self.rate
        seconds = _UNMEASURED_LATE_S if rate is None else max(_MIN_LATE_S, _LATE_TIMES * self.tokens / rate)
        return seconds * 2 ** max((queued.times_late for queued in self.taken), default=0)

    def end_forward(self, tokens: int, seconds: float, *, is_whole: bool) -> None:
        """Count a forward that ended, and measure the speed if it was large enough.

        Args:
            is_whole: every prompt got a vector. A forward that fails says nothing of the speed: most fail at once.
        """
        self.forwards += 1
        self.taken = []
        if tokens < _MIN_MEASURED_TOKENS or not is_whole:
            return
        rate, average = tokens / max(seconds, 1e-6), self.tokens_per_second
        self.tokens_per_second = rate if average is None else 0.8 * average + 0.2 * rate

    def lose_forward(self, is_late: bool) -> list[QueuedPrompt]:
        """Count a forward that gave no answer, and return its prompts, for other hands."""
        tokens, rate = self.tokens, self.rate
        taken, self.taken = self.taken, []
        for queued in taken:
            queued.times_late += is_late
            queued.times_lost += not is_late
        self.times_late += is_late
        self.times_lost += not is_late
        if is_late and rate is not None and tokens >= _MIN_MEASURED_TOKENS:
            self.tokens_per_second = rate / 2  # it is slower than expected, if it is alive at all
        return taken
