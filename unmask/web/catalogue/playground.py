"""The playground: encode a few texts with a live model, compare them, and rank them for a query."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import numpy as np

from unmask.api.errors import ApiError
from unmask.encoder import Prompt
from unmask.encoder.encoder import postprocess
from unmask.router import EmbeddingWork, ModelRegistry, ModelRoute, ProviderPreferences, ServedModel, find_route

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


async def run_trial(models: ModelRegistry, served: ServedModel, trial: Trial, caller: str) -> TrialResult:
    """Encode the texts and the query like any other request, here or at a provider, and compare them.

    Args:
        models: of the server.
        served: the one to try.
        trial: the form.
        caller: whose share of the model it takes.

    Raises:
        InputError, EngineError, CheckpointError: the model cannot encode them, or not within 30 seconds.
    """
    deadline = time.monotonic() + _DEADLINE_S
    route = await find_route(served, models.providers, _DEADLINE_S / 2)
    start = time.monotonic()
    with route.lease():
        prompts, texts = await _encode(route, trial.texts, route.record.document_instruction, deadline, caller)
        nearest: list[tuple[str, float, int]] = []
        if trial.query:
            more, query = await _encode(route, [trial.query], route.record.query_instruction, deadline, caller)
            prompts += more
            scores = texts @ query[0]
            nearest = [(trial.texts[at], float(scores[at]), _shade(scores[at])) for at in np.argsort(-scores)]
    similarity = texts @ texts.T
    return TrialResult(
        [[(float(value), _shade(value)) for value in row] for row in similarity],
        nearest,
        sum(len(prompt.ids) for prompt in prompts),
        time.monotonic() - start,
    )


async def _encode(
    route: ModelRoute, texts: Sequence[str], instruction: str, deadline: float, caller: str
) -> tuple[list[Prompt], np.ndarray]:
    """Return the prompts of texts, and their vectors of length 1, float32 [n, dim]."""
    prompts = await route.prepare(texts, instruction=instruction, truncate=True)
    work = EmbeddingWork(
        texts=texts,
        prompts=prompts,
        instruction=instruction,
        raw=False,
        deadline=deadline,
        share=caller,
        preferences=ProviderPreferences(),
        precision=route.precision,
    )
    try:
        routed = await route.run(work)
    finally:
        if route.pool is not None:
            route.pool.record_attempts(work.attempts)
    return list(prompts), postprocess(routed.vectors, normalize=True, dimensions=None)


def _shade(cosine: float) -> int:
    return min(SHADES - 1, max(0, int(cosine * SHADES)))
