"""`UnpublishedCanaries`: canary texts that are published nowhere, so no provider can know them or their vectors.

The words are published, but the texts are drawn anew on every machine: short queries, sentences, orders, addresses
and lists, in the mixture of cases, accents, scripts and white space in which users write.
"""

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from unmask.encoder import Encoder
from unmask.encoder.prompts import Prompt
from unmask.errors import TextTooLong

NUMBER = 256

# Longer texts would make a health check dear.
_MAX_TOKENS = 200


@dataclass(frozen=True, eq=False)
class UnpublishedCanaries:
    """Texts that only this machine knows, with their right vectors.

    Attributes:
        texts: without instructions; the arrays are in their order.
        vectors: float32 [texts, dim], of length 1.
        num_tokens: tokens of each text's sequence, int64 [texts].
    """

    texts: tuple[str, ...]
    vectors: np.ndarray
    num_tokens: np.ndarray


def draw_prompts(encoder: Encoder, draw: random.Random, number: int = NUMBER) -> dict[str, Prompt]:
    """Draw texts that are short enough for a model, and build their prompts.

    Args:
        encoder: the model.
        draw: source of chance; `random.SystemRandom` for texts that nobody can draw again.
        number: of texts.
    """
    prompts: dict[str, Prompt] = {}
    while len(prompts) < number:
        for text in draw_texts(draw, number - len(prompts)):
            try:
                prompt = encoder.prompts.build([text], truncate=False)[0]
            except TextTooLong:
                continue
            if len(prompt.ids) <= _MAX_TOKENS:
                prompts[text] = prompt
    return prompts


def draw_texts(draw: random.Random, number: int) -> tuple[str, ...]:
    """Draw texts, all different, of 2 to about 80 words.

    Args:
        draw: source of chance; `random.SystemRandom` for texts that nobody can draw again.
        number: of texts.
    """
    texts: dict[str, None] = {}
    while len(texts) < number:
        texts[draw.choice(_FORMS)(draw)] = None
    return tuple(texts)


@cache
def _words() -> dict[str, list[str]]:
    return tomllib.loads(files("unmask.conformance").joinpath("unpublished_words.toml").read_text(encoding="utf-8"))


def _word(draw: random.Random, kind: str) -> str:
    return draw.choice(_words()[kind])


def _clause(draw: random.Random) -> str:
    words = [_word(draw, kind) for kind in ("people", "actions", "things")]
    words += [_word(draw, kind) for kind in ("places", "times") if draw.random() < 0.7]
    if draw.random() < 0.3:
        words.append(_word(draw, "reasons"))
    return " ".join(words)


def _sentence(draw: random.Random) -> str:
    clause = _clause(draw)
    return clause[0].upper() + clause[1:] + draw.choice(".....!?")


def _query(draw: random.Random) -> str:
    query = f"{_word(draw, 'things')} {_word(draw, 'places')}"
    return draw.choice((query, query.upper(), query.title(), f"how to sell {query}?", f"{query} price {_amount(draw)}"))


def _amount(draw: random.Random) -> str:
    return f"{draw.choice(('€', '$', '£', ''))}{draw.randrange(1, 9999)}.{draw.randrange(100):02}"


def _order(draw: random.Random) -> str:
    lines = [
        f"- {draw.randrange(2, 60)} x {_word(draw, 'things')}, {_amount(draw)}" for _ in range(draw.randrange(2, 6))
    ]
    return "\n".join([f"Order {draw.randrange(10**6):06}:", *lines])


def _record(draw: random.Random) -> str:
    number = draw.randrange(10**5)
    return draw.choice(
        (
            f'{{"id": {number}, "item": "{_word(draw, "things")}", "paid": {draw.choice(("true", "false"))}}}',
            f"https://shop-{number}.example/{_word(draw, 'actions')}?page={draw.randrange(90)}",
            f"def item_{number}(x):\n    return x * {draw.randrange(2, 99)}  # {_word(draw, 'things')}",
            f"{_word(draw, 'people')}\t{_amount(draw)}\t{_word(draw, 'times')}",
        )
    )


def _mixture(draw: random.Random) -> str:
    return f"{_sentence(draw)} {_word(draw, 'fragments')} {_word(draw, 'times')}"


def _paragraph(draw: random.Random) -> str:
    return " ".join(_sentence(draw) for _ in range(draw.randrange(2, 6)))


_FORMS: tuple[Callable[[random.Random], str], ...] = (
    _sentence,
    _sentence,
    _sentence,
    _query,
    _query,
    _order,
    _record,
    _mixture,
    _paragraph,
)
