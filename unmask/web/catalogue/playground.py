"""The playground: encode a few texts with a live model, compare them, and rank them for a query."""

import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import numpy as np

from unmask.api.errors import ApiError
from unmask.encoder.encoder import postprocess
from unmask.router import ServedModel

MAX_TEXTS = 12
MAX_CHARACTERS = 1_000  # per text
BODY_LIMIT_BYTES = 64 * 1024
TRIALS_PER_MINUTE = 20
SHADES = 10

_DEADLINE_S = 30.0
EXAMPLE = (
    "How do I reset my password?",
    "I forgot my login and cannot sign in.",
    "The invoice for March is missing.",
    "Where can I download last month's bill?",
    "Our office is closed on Monday.",
)


@dataclass(frozen=True)
class Trial:
    """Texts and query of the playground's form."""

    texts: list[str]
    query: str = ""

    @property
    def joined(self) -> str:
        return "\n".join(self.texts)


@dataclass(frozen=True)
class TrialResult:
    """Similarities that a model computed for a trial.

    Attributes:
        matrix: for each pair of texts (cosine, shade); the shade is from 0 to SHADES - 1.
        nearest: (text, cosine, shade), nearest to the query first.
        tokens: tokens that the model read.
        seconds: time from the texts to the vectors.
    """

    matrix: list[list[tuple[float, int]]]
    nearest: list[tuple[str, float, int]]
    tokens: int
    seconds: float


@dataclass
class TrialLimit:
    """Token bucket for each visitor's address. Entries older than a minute are dropped when there are many."""

    per_minute: int = TRIALS_PER_MINUTE
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)  # address -> (trials left, time)

    def take(self, caller: str, now: float | None = None) -> None:
        """Count one trial.

        Raises:
            ApiError: 429, with the seconds until the next trial is allowed.
        """
        now = time.monotonic() if now is None else now
        left, then = self._buckets.get(caller, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        if left < 1:
            wait = (1 - left) * 60 / self.per_minute
            message = f"That was {self.per_minute} trials within a minute, which is the most: wait {wait:.0f} seconds."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if len(self._buckets) > 10_000:
            self._buckets = {who: bucket for who, bucket in self._buckets.items() if now - bucket[1] < 60}
        self._buckets[caller] = (left - 1, now)


def parse_trial(body: bytes) -> tuple[str, Trial]:
    """Read the form: the model's id, and the texts with the query.

    Raises:
        ApiError: 400, the body is not a form in UTF-8.
    """
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=8)
    except ValueError as error:
        raise ApiError(400, "The form could not be read: send it as the page has it.", code="bad_form") from error
    model, query = fields.get("model", [""])[0], fields.get("query", [""])[0].strip()
    lines = fields.get("texts", [""])[0].replace("\x00", "").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    return model, Trial(texts, query.replace("\x00", ""))


def trial_error(trial: Trial) -> str:
    """Return a sentence that says why a trial cannot be run; an empty text if it can."""
    if len(trial.texts) < 1 + (not trial.query):
        return "Write at least two lines, or one line and a query."
    if len(trial.texts) > MAX_TEXTS:
        return f"There are {len(trial.texts)} lines; {MAX_TEXTS} can be tried at a time."
    longest = max(map(len, [*trial.texts, trial.query]))
    if longest > MAX_CHARACTERS:
        return f"A line has {longest:,} characters; {MAX_CHARACTERS:,} can be tried."
    return ""


async def run_trial(served: ServedModel, trial: Trial, caller: str) -> TrialResult:
    """Encode the texts and the query in the model's queue, beside all other requests, and compare them.

    Raises:
        InputError, EngineError, CheckpointError: the model cannot encode them, or not within 30 seconds.
    """
    deadline = time.monotonic() + _DEADLINE_S
    engine = await served.engine(wait=_DEADLINE_S / 2)
    start = time.monotonic()
    record = served.record
    prompts = list(await engine.prepare(trial.texts, instruction=record.document_instruction, truncate=True))
    if trial.query:
        prompts += await engine.prepare([trial.query], instruction=record.query_instruction, truncate=True)
    raw = await engine.run(prompts, deadline=deadline, caller=caller)
    vectors = postprocess(raw, normalize=True, dimensions=None)
    seconds = time.monotonic() - start
    texts = vectors[: len(trial.texts)]
    similarity = texts @ texts.T
    nearest: list[tuple[str, float, int]] = []
    if trial.query:
        scores = texts @ vectors[-1]
        nearest = [(trial.texts[at], float(scores[at]), _shade(scores[at])) for at in np.argsort(-scores)]
    return TrialResult(
        [[(float(value), _shade(value)) for value in row] for row in similarity],
        nearest,
        sum(len(prompt.ids) for prompt in prompts),
        seconds,
    )


def _shade(cosine: float) -> int:
    return min(SHADES - 1, max(0, int(cosine * SHADES)))
