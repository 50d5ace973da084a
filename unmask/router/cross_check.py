"""Cross-checks: a new text is asked of a provider and of others, and they must agree.

A provider that knows every canary by now, or that answers other texts wrongly on purpose, passes all its checks. It
cannot know a text that is drawn at this moment. Texts of customers are never sent for this.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from unmask.accounts.costs import AttemptRecord
from unmask.conformance import References, worst_limit
from unmask.conformance.references import PRECISION_CLASSES, distances
from unmask.conformance.unpublished_canaries import draw_texts
from unmask.encoder import Dtype, Prompt
from unmask.encoder.prompts import PromptBuilder
from unmask.engine import Engine
from unmask.errors import EngineError, TextTooLong
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.request_history import Outcome
from unmask.router.signals import AttemptFailed
from unmask.router.wire import ask, require_vectors

_SECONDS = 30.0
_MAX_TOKENS = 100
_MAX_PARTIES = 3  # the odd one of three is wrong


@dataclass(frozen=True, eq=False)
class Opinion:
    """One party's vector of the text.

    Attributes:
        endpoint: of a provider; None for this server's own engine, which is right.
        vector: float32 [dim], of length 1.
        limit: largest 1 - cosine to the right vector in its precision.
    """

    endpoint: ProviderEndpoint | None
    vector: np.ndarray
    limit: float


class Verdicts(NamedTuple):
    """The outcome of a cross-check.

    Attributes:
        wrong_endpoints: endpoints whose vector is wrong.
        suspects: endpoints that disagree, of which nobody knows who is right.
    """

    wrong_endpoints: list[ProviderEndpoint]
    suspects: list[ProviderEndpoint]


async def cross_check(
    endpoints: Sequence[ProviderEndpoint],
    engine: Engine | None,
    references: References,
    prompts: PromptBuilder,
    draw: random.Random,
) -> tuple[Verdicts, list[AttemptRecord]]:
    """Ask for the vector of a new text, and compare.

    Args:
        endpoints: admitted ones; the first is checked.
        engine: this process's own engine, if it is loaded.
        references: of the model.
        prompts: its text handling.
        draw: source of chance.

    Returns:
        The outcome, and the attempts for the books.
    """
    text, prompt = _new_text(prompts, draw)
    attempts: list[AttemptRecord] = []
    parties = endpoints[:1] if engine is not None else endpoints[:_MAX_PARTIES]
    requests = [_ask(endpoint, text, prompt, references, attempts) for endpoint in parties]
    own = [_compute(engine, prompt, references)] if engine is not None else []
    opinions = [opinion for opinion in await asyncio.gather(*own, *requests) if opinion is not None]
    return compare_opinions(opinions), attempts


def compare_opinions(opinions: Sequence[Opinion]) -> Verdicts:
    """Find whose vector is wrong: whoever differs from this server's engine, or from two others that agree."""

    def agrees(one: Opinion, other: Opinion) -> bool:
        # Both may be off to either side of the right vector: angles add, and 1 - cosine is half an angle's square.
        limit = (one.limit**0.5 + other.limit**0.5) ** 2
        return bool(distances(one.vector[None], other.vector[None])[0] <= limit)

    own = [opinion for opinion in opinions if opinion.endpoint is None]
    others = [(opinion, opinion.endpoint) for opinion in opinions if opinion.endpoint is not None]
    if own:
        return Verdicts([endpoint for opinion, endpoint in others if not agrees(own[0], opinion)], [])
    friends = [sum(agrees(one, other) for other, _ in others) for one, _ in others]  # oneself included
    if all(count == len(others) for count in friends):
        return Verdicts([], [])
    if sorted(friends) == [1, 2, 2]:
        return Verdicts([endpoint for (_, endpoint), count in zip(others, friends, strict=True) if count == 1], [])
    return Verdicts([], [endpoint for _, endpoint in others])


def _new_text(prompts: PromptBuilder, draw: random.Random) -> tuple[str, Prompt]:
    while True:
        (text,) = draw_texts(draw, 1)
        try:
            (prompt,) = prompts.build([text], truncate=False)
        except TextTooLong:
            continue
        if len(prompt.ids) <= _MAX_TOKENS:
            return text, prompt


async def _compute(engine: Engine, prompt: Prompt, references: References) -> Opinion | None:
    try:
        vectors = await engine.run([prompt], deadline=time.monotonic() + _SECONDS, caller="cross-check")
    except EngineError:
        return None
    precision = PRECISION_CLASSES[cast(Dtype, engine.encoder.dtype_choice.dtype)]
    return Opinion(None, vectors[0], worst_limit(references, precision))


async def _ask(
    endpoint: ProviderEndpoint, text: str, prompt: Prompt, references: References, attempts: list[AttemptRecord]
) -> Opinion | None:
    """Ask a provider. Returns None if it does not answer, or was taken out of traffic meanwhile."""
    started, changes, name = time.monotonic(), endpoint.admission_changes, endpoint.provider.name
    outcome: Outcome = "cancelled"  # unless something else happens
    theirs = None
    try:
        answer = await ask(endpoint.client, endpoint.model, [text], dim=references.dim, seconds=_SECONDS)
        theirs = answer.prompt_tokens
        vector = require_vectors(answer, references.dim, name)[0]
        outcome = "answered"
    except AttemptFailed as failure:
        outcome = failure.signal
        return None
    finally:
        seconds = time.monotonic() - started
        attempts.append(endpoint.record(outcome, "probe", len(prompt.ids), theirs, seconds))
    if not endpoint.is_admitted_since(changes):
        return None
    return Opinion(endpoint, vector, worst_limit(references, endpoint.model.precision_class))
