"""Canary texts: about 64 short texts of our own, in groups, each of which shows one kind of fault."""

import hashlib
import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from unmask.encoder.prompts import PromptBuilder
from unmask.errors import InstructionTooLong, TextTooLong

# Lengths in tokens at which implementations cut texts, besides the model's own maximum.
_BOUNDARIES = (128, 256, 512)

# The longest boundary pair. A longer one would cost more than the whole set, at each full run.
_LONGEST = 2048


@dataclass(frozen=True)
class CanaryText:
    """A text whose right vector is known.

    Attributes:
        group: the kind of fault that it shows: "plain", "short", "case", "accents", "scripts", "whitespace", "control",
            "paragraphs", "boundaries" or "instructions".
        text: the text.
        instruction: its instruction; empty for all groups but "instructions".
        boundary: for a boundary pair, the length in tokens at which both texts end; 0 for others. The two texts of a
            pair are neighbours and differ only in their last words.
    """

    group: str
    text: str
    instruction: str = ""
    boundary: int = 0


def canary_texts(prompts: PromptBuilder, max_tokens: int) -> tuple[CanaryText, ...]:
    """Return the canary texts of a model.

    Args:
        prompts: of the model, whose tokenizer decides how long a boundary pair must be.
        max_tokens: the longest sequence of the model.
    """
    boundaries = sorted({*(k for k in _BOUNDARIES if k < max_tokens), min(max_tokens, _LONGEST)})
    pairs = [canary for boundary in boundaries for canary in boundary_pair(prompts, boundary)]
    return tuple(canary for canary in (*fixed_texts(), *pairs) if _fits(prompts, canary))


def boundary_pair(prompts: PromptBuilder, boundary: int) -> list[CanaryText]:
    """Return two texts of at most `boundary` tokens and close to it, which differ in their last words."""
    return [CanaryText("boundaries", text, boundary=boundary) for text in _pair(prompts, boundary, _data()["boundary"])]


def fixed_texts() -> tuple[CanaryText, ...]:
    """Return the canary texts that all models share."""
    return tuple(
        CanaryText(group["name"], text, group.get("instruction", ""))
        for group in _data()["group"]
        for text in group["texts"]
    )


def _fits(prompts: PromptBuilder, canary: CanaryText) -> bool:
    """False for a text that is too long for the model, or shortened below its maximum as in the reference mode."""
    try:
        prompts.build([canary.text], canary.instruction, truncate=False)
    except (TextTooLong, InstructionTooLong):
        return False
    return True


def canary_set_version(canaries: Sequence[CanaryText]) -> str:
    """Return a digest of canary texts: 8 hex digits."""
    digest = hashlib.sha256()
    for canary in canaries:
        digest.update(f"{canary.group}\0{canary.instruction}\0{canary.text}\0".encode())
    return digest.hexdigest()[:8]


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(files("unmask.conformance").joinpath("canaries.toml").read_text(encoding="utf-8"))


def _pair(prompts: PromptBuilder, length: int, data: dict[str, Any]) -> list[str]:
    """Return two texts with the same head and different tails, each of at most `length` tokens and close to it."""
    words = list(itertools.islice(itertools.cycle(data["words"].split()), length))

    def texts(count: int) -> list[str]:
        return [" ".join([*words[:count], tail]) for tail in data["tails"]]

    fits, too_long = 0, length
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if max(prompts.lengths(texts(middle))) <= length:
            fits = middle
        else:
            too_long = middle
    return texts(fits)
