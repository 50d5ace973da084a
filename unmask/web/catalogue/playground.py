"""Trying a model: a few texts, how alike they are, and which of them a query is nearest to."""

import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import numpy as np

from unmask.api.errors import ApiError
from unmask.encoder.encoder import finish
from unmask.router import ServedModel

MOST_TEXTS = 12
MOST_CHARACTERS = 1_000  # per text
BODY_LIMIT = 64 * 1024
PER_MINUTE = 20
SHADES = 10

_SECONDS = 30.0
EXAMPLE = (
    "How do I reset my password?",
    "I forgot my login and cannot sign in.",
    "The invoice for March is missing.",
    "Where can I download last month's bill?",
    "Our office is closed on Monday.",
)


@dataclass(frozen=True)
class Trial:
    """What a visitor typed."""

    texts: list[str]
    query: str = ""

    @property
    def joined(self) -> str:
        return "\n".join(self.texts)


@dataclass(frozen=True)
class Outcome:
    """What a model made of it.

    Attributes:
        matrix: cosine of each pair of texts, with its shade from 0 to SHADES - 1.
        nearest: (text, cosine, shade), nearest to the query first.
        tokens: that the model read.
        seconds: from the tokens to the vectors.
    """

    matrix: list[list[tuple[float, int]]]
    nearest: list[tuple[str, float, int]]
    tokens: int
    seconds: float


@dataclass
class Allowance:
    """How often each visitor may try, by address: a bucket that refills. Old ones are forgotten."""

    per_minute: int = PER_MINUTE
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, caller: str, now: float | None = None) -> None:
        """Count one trial.

        Raises:
            ApiError: 429, with the seconds after which there is room again.
        """
        now = time.monotonic() if now is None else now
        left, then = self._left.get(caller, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        if left < 1:
            wait = (1 - left) * 60 / self.per_minute
            message = f"That was {self.per_minute} trials within a minute, which is the most: wait {wait:.0f} seconds."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if len(self._left) > 10_000:
            self._left = {who: entry for who, entry in self._left.items() if now - entry[1] < 60}
        self._left[caller] = (left - 1, now)


def read_trial(body: bytes) -> tuple[str, Trial]:
    """The model's id and the texts of a form.

    Raises:
        ApiError: 400, it is not that form, or there is too little or too much in it.
    """
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=8)
    except ValueError as error:
        raise ApiError(400, "The form could not be read: send it as the page has it.", code="bad_form") from error
    model, query = fields.get("model", [""])[0], fields.get("query", [""])[0].strip()
    lines = fields.get("texts", [""])[0].replace("\x00", "").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    return model, Trial(texts, query.replace("\x00", ""))


def check_trial(trial: Trial) -> str:
    """What is wrong with a trial, in a sentence; nothing if it can be run."""
    if len(trial.texts) < 1 + (not trial.query):
        return "Write at least two lines, or one line and a query."
    if len(trial.texts) > MOST_TEXTS:
        return f"There are {len(trial.texts)} lines; {MOST_TEXTS} can be tried at a time."
    longest = max(map(len, [*trial.texts, trial.query]))
    if longest > MOST_CHARACTERS:
        return f"A line has {longest:,} characters; {MOST_CHARACTERS:,} can be tried."
    return ""


async def run_trial(served: ServedModel, trial: Trial, caller: str) -> Outcome:
    """Encode and compare, in the queue with everybody else's requests.

    Raises:
        InputError, EngineError, CheckpointError: the model cannot do it, or not now.
    """
    deadline = time.monotonic() + _SECONDS
    engine = await served.engine(wait=_SECONDS / 2)
    began = time.monotonic()
    document, asked = served.record.document_instruction, served.record.query_instruction
    prompts = list(await engine.prepare(trial.texts, instruction=document, truncate=True))
    if trial.query:
        prompts += await engine.prepare([trial.query], instruction=asked, truncate=True)
    raw = await engine.run(prompts, deadline=deadline, caller=caller)
    vectors = finish(raw, normalize=True, dimensions=None)
    seconds = time.monotonic() - began
    texts = vectors[: len(trial.texts)]
    similarity = texts @ texts.T
    nearest: list[tuple[str, float, int]] = []
    if trial.query:
        scores = texts @ vectors[-1]
        nearest = [(trial.texts[at], float(scores[at]), _shade(scores[at])) for at in np.argsort(-scores)]
    return Outcome(
        [[(float(value), _shade(value)) for value in row] for row in similarity],
        nearest,
        sum(len(prompt.ids) for prompt in prompts),
        seconds,
    )


def _shade(cosine: float) -> int:
    return min(SHADES - 1, max(0, int(cosine * SHADES)))
