"""Ask somebody for the vectors of canary texts: a full run, or the few texts of a light one."""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unmask.conformance.references import References

_REPEATED = 4  # plain texts that are asked for again
_REPEATS = 2
_LIGHT_TEXTS = 3
_UNPUBLISHED = 16  # texts of a full run that the provider cannot know


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one request, before anything is known to be right about it.

    Attributes:
        vectors: one per text in the order of the texts, float32 [dim]; their lengths may differ.
        raw: the bytes that each vector was decoded from, where it came as base64.
        prompt_tokens: tokens by the count of whoever answered; None if they did not say.
        origin: signs of the server that answered, which stay the same as long as nothing there is replaced.
    """

    vectors: Sequence[np.ndarray]
    raw: Sequence[bytes] = ()
    prompt_tokens: int | None = None
    origin: str = ""


# Texts and their instruction -> their vectors.
Ask = Callable[[Sequence[str], str], Awaitable[Answer]]


@dataclass(frozen=True, eq=False)
class CanaryAnswers:
    """The answers of a full run.

    Attributes:
        rows: rows of the references that were asked for, [n].
        vectors, raw: the answer to each, as in `Answer`.
        repeats: further answers to texts that were asked for alone: (row, vector).
        arrangements: answers to texts among long neighbours, twice in a request, or after a long text: (row, vector).
        unpublished: answers to unpublished texts: (row of `References.unpublished`, vector).
        num_tokens: tokens that the run sent, without those of unpublished texts, by our count.
        their_tokens: tokens by the count of whoever answered; None if they never said.
    """

    rows: np.ndarray
    vectors: Sequence[np.ndarray]
    raw: Sequence[bytes]
    repeats: Sequence[tuple[int, np.ndarray]]
    arrangements: Sequence[tuple[int, np.ndarray]]
    unpublished: Sequence[tuple[int, np.ndarray]]
    num_tokens: int
    their_tokens: int | None


async def full_run(
    ask: Ask,
    references: References,
    draw: random.Random,
    *,
    max_inputs: int = 2048,
    max_tokens: int | None = None,
    instructions: bool = True,
    control_tokens: bool = True,
) -> CanaryAnswers:
    """Ask for all canary texts, for some of them again, for some in other batches, and for some unpublished ones.

    Args:
        ask: sends one request; whatever it raises ends the run.
        references: of the model.
        draw: source of chance.
        max_inputs: most texts of one request.
        max_tokens: longest text to ask for; None for the model's own maximum.
        instructions: False for somebody who cannot be given instructions.
        control_tokens: False for somebody who is never sent texts that look like control tokens.
    """
    longest = min(max_tokens or references.max_tokens, references.max_tokens)
    rows = [
        row
        for row, canary in enumerate(references.canaries)
        if references.num_tokens[row] <= longest
        and (instructions or not canary.instruction)
        and (control_tokens or canary.group != "control")
    ]
    vectors: dict[int, np.ndarray] = {}
    raw: dict[int, bytes] = {}
    sent, counted = 0, []

    async def send(batch: Sequence[int]) -> Answer:
        nonlocal sent
        canaries = [references.canaries[row] for row in batch]
        answer = await ask([canary.text for canary in canaries], canaries[0].instruction)
        sent += int(references.num_tokens[list(batch)].sum())
        counted.append(answer.prompt_tokens)
        return answer

    for instruction in dict.fromkeys(references.canaries[row].instruction for row in rows):
        members = [row for row in rows if references.canaries[row].instruction == instruction]
        for first in range(0, len(members), max_inputs):
            batch = members[first : first + max_inputs]
            answer = await send(batch)
            vectors |= zip(batch, answer.vectors, strict=True)
            raw |= zip(batch, answer.raw, strict=False)
    plain = [row for row in rows if references.canaries[row].group == "plain"]
    repeats = [(row, (await send([row])).vectors[0]) for _ in range(_REPEATS) for row in plain[:_REPEATED]]
    arrangements = []
    for batch in _arrangements(references, rows, plain, max_inputs):
        answer = await send(batch)
        arrangements += [(row, vector) for row, vector in zip(batch, answer.vectors, strict=True) if row in plain]
    unpublished = []
    drawn = light_rows(references, draw, number=_UNPUBLISHED, max_tokens=max_tokens)
    for first in range(0, len(drawn), max_inputs):
        part = drawn[first : first + max_inputs]
        answer = await ask([references.unpublished.texts[row] for row in part], "")
        unpublished += zip(part, answer.vectors, strict=True)
    return CanaryAnswers(
        rows=np.array(rows),
        vectors=[vectors[row] for row in rows],
        raw=[raw[row] for row in rows] if len(raw) == len(rows) else (),
        repeats=repeats,
        arrangements=arrangements,
        unpublished=unpublished,
        num_tokens=sent,
        their_tokens=None if None in counted else sum(count for count in counted if count is not None),
    )


def light_rows(
    references: References, draw: random.Random, *, number: int = _LIGHT_TEXTS, max_tokens: int | None = None
) -> list[int]:
    """Draw unpublished texts: rows of `References.unpublished`.

    A published text would tell the provider that it is being checked. A text that is always the same would let a cache
    on the way hide that the model behind it has changed.

    Args:
        references: of the model.
        draw: source of chance.
        number: most texts.
        max_tokens: longest text; None for any.
    """
    lengths = references.unpublished.num_tokens
    pool = [row for row, length in enumerate(lengths) if max_tokens is None or length <= max_tokens]
    pool = pool or [int(lengths.argmin())]
    return draw.sample(pool, min(number, len(pool)))


def _arrangements(
    references: References, rows: Sequence[int], plain: Sequence[int], max_inputs: int
) -> list[list[int]]:
    """Return requests that put plain texts among others, which must not change their vectors."""
    long = [row for row in rows if references.canaries[row].group == "paragraphs"]
    long += [row for row in rows if references.canaries[row].boundary][-1:]
    if len(plain) < 4 or not long:
        return []
    first, middle, last, twice = plain[:4]
    others = long[: max(1, min(max_inputs - 4, 12))]
    half = len(others) // 2
    together = [first, *others[:half], middle, *others[half:], last]
    requests = [together, [twice, twice], [long[-1], twice]]
    return [request for request in requests if len(request) <= max_inputs]
