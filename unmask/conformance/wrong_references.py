"""The bank of wrong references: the vectors that a model gives under each common mistake, with the mistake's name."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from unmask.checkpoint.resolve import resolve
from unmask.conformance.canaries import CanaryText
from unmask.encoder import Encoder
from unmask.encoder.loading import LoadOptions
from unmask.encoder.pooling import pool
from unmask.encoder.prompts import DefaultPrompts, Prompt
from unmask.encoder.templates import Template, template_for
from unmask.encoder.unit_length import unit_length

_POOLING_WORDS = {
    "mean": "the mean",
    "weighted_mean": "the weighted mean",
    "last_token": "the last token",
    "eos_token": "the EOS token",
    "first_token": "the first token of the text",
    "bos_token": "the first token",
}
_TRUNCATIONS = (128, 256, 512)


class WrongReference(NamedTuple):
    """The vectors of all canary texts under one mistake.

    Attributes:
        fault: the mistake, as a clause that follows the name of whoever makes it.
        vectors: float32 [canaries, dim], of length 1. Rows that the mistake does not change are the right ones.
    """

    fault: str
    vectors: np.ndarray


@dataclass(frozen=True, eq=False)
class _Subject:
    """The model, its canary texts, and their right prompts and vectors."""

    encoder: Encoder
    canaries: Sequence[CanaryText]
    prompts: list[Prompt]
    vectors: np.ndarray  # float32 [canaries, dim], raw


def canary_prompts(
    encoder: Encoder, canaries: Sequence[CanaryText], skip: frozenset[str] = frozenset()
) -> list[Prompt]:
    """Build the prompts of canary texts, each with its own instruction; `skip` names texts to leave out of it."""
    return [
        encoder.prompts.build([canary.text], "" if canary.text in skip else canary.instruction, truncate=False)[0]
        for canary in canaries
    ]


def wrong_references(
    encoder: Encoder, canaries: Sequence[CanaryText], source: str, options: LoadOptions
) -> Iterator[WrongReference]:
    """Yield the vectors of every mistake that applies to the model.

    Args:
        encoder: the model, in float32.
        canaries: its canary texts.
        source, options: by which it was loaded; some mistakes need it to be loaded again.
    """
    prompts = canary_prompts(encoder, canaries)
    subject = _Subject(encoder, canaries, prompts, encoder.encode_prompts(prompts))
    yield from _poolings(subject)
    for fault, change in _prompt_changes(subject):
        yield WrongReference(fault, _vectors_of(subject, [change(p) for p in prompts]))
    for fault, changed_prompts in _text_changes(subject):
        yield WrongReference(fault, _vectors_of(subject, changed_prompts))
    causal = Encoder.load_with(source, replace(options, causal=True))
    yield WrongReference("keeps the causal mask", unit_length(causal.encode_prompts(prompts), in_float64=True))
    location = resolve(source, options.adapters)
    for left_out in range(len(location.adapters)):
        adapters = [path for index, path in enumerate(location.adapters) if index != left_out]
        bare = Encoder.load_with(
            location.base,
            replace(options, adapters=adapters, pooling=encoder.pooling, max_length=encoder.max_length),
        )
        fault = f"leaves out adapter {left_out + 1} of {len(location.adapters)} ({location.adapters[left_out].name})"
        yield WrongReference(fault, unit_length(bare.encode_prompts(prompts), in_float64=True))


def _poolings(subject: _Subject) -> Iterator[WrongReference]:
    """Yield the vectors of other poolings, from one forward over all texts."""
    encoder, right = subject.encoder, subject.encoder.pooling
    states = encoder.states([prompt.ids for prompt in subject.prompts])  # [T, W]

    def pooled(pooling: str, spans: Callable[[Prompt], tuple[int, int]]) -> np.ndarray:
        with torch.inference_mode():
            vectors = pool(states, [replace(prompt, pooled=spans(prompt)) for prompt in subject.prompts], pooling)
            return unit_length((vectors if encoder.head is None else encoder.head(vectors)).numpy(), in_float64=True)

    def all_tokens(prompt: Prompt) -> tuple[int, int]:
        return 0, len(prompt.ids)

    same = {"eos_token": "last_token"}
    if all(prompt.pooled[0] == 0 for prompt in subject.prompts):
        same["first_token"] = "bos_token"  # all tokens are pooled, BOS too
    for pooling in ("mean", "weighted_mean", "last_token", "first_token", "bos_token"):
        if pooling in same:
            continue  # the other name stands for both
        if same.get(right, right) != pooling:
            fault = f"pools {_POOLING_WORDS[pooling]}; the model pools {_POOLING_WORDS[right]}"
            yield WrongReference(fault, pooled(pooling, lambda prompt: prompt.pooled))
    if right in ("mean", "weighted_mean"):
        yield WrongReference(
            f"pools {_POOLING_WORDS[right]} of all tokens; the model leaves out BOS, template and instruction",
            pooled(right, all_tokens),
        )
        yield WrongReference(
            f"leaves the last token out of {_POOLING_WORDS[right]}",
            pooled(right, lambda prompt: (prompt.pooled[0], max(prompt.pooled[0] + 1, prompt.pooled[1] - 1))),
        )
    else:
        yield WrongReference(
            "pools the token before the last one", pooled("last_token", lambda p: (0, max(1, p.pooled[1] - 1)))
        )


def _prompt_changes(subject: _Subject) -> Iterator[tuple[str, Callable[[Prompt], Prompt]]]:
    """Yield mistakes in the tokens around a text."""
    tokenizer = subject.encoder.checkpoint.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    begins_with_bos = bos is not None and all(prompt.ids[0] == bos for prompt in subject.prompts)
    ends_with_eos = eos is not None and all(prompt.ids[-1] == eos for prompt in subject.prompts)

    def moved(prompt: Prompt, ids: np.ndarray, start: int, stop: int) -> Prompt:
        first, last = prompt.pooled[0] + start, prompt.pooled[1] + stop
        return replace(prompt, ids=ids, pooled=(max(first, 0), last))

    if begins_with_bos:
        yield "leaves out the BOS token", lambda p: moved(p, p.ids[1:], -1, -1)
        # A mean that has BOS in it has both.
        yield (
            "begins with two BOS tokens",
            lambda p: moved(p, np.concatenate([p.ids[:1], p.ids]), min(1, p.pooled[0]), 1),
        )
    elif bos is not None:
        yield "adds a BOS token", lambda p: moved(p, np.concatenate([[bos], p.ids]), 1, 1)
    if ends_with_eos:
        yield "leaves out the EOS token", lambda p: moved(p, p.ids[:-1], 0, -1)
    elif eos is not None:
        yield "adds an EOS token", lambda p: moved(p, np.concatenate([p.ids, [eos]]), 0, 1)


def _text_changes(subject: _Subject) -> Iterator[tuple[str, list[Prompt]]]:
    """Yield mistakes in the text, the template, the instruction or the length."""
    encoder, canaries = subject.encoder, subject.canaries

    def edited(edit: Callable[[str], str]) -> list[Prompt]:
        changed = [replace(canary, text=edit(canary.text) or canary.text) for canary in canaries]
        return [encoder.prompts.build([canary.text], canary.instruction)[0] for canary in changed]

    yield "lower-cases texts", edited(str.lower)
    yield "strips accents", edited(_without_accents)
    yield "changes texts to NFC", edited(lambda text: unicodedata.normalize("NFC", text))
    yield "joins lines and blanks", edited(lambda text: " ".join(text.split()))
    yield "replaces line breaks by blanks", edited(lambda text: text.replace("\n", " "))
    instructed = frozenset(canary.text for canary in canaries if canary.instruction)
    yield "leaves out the instruction", canary_prompts(encoder, canaries, instructed)
    yield (
        "pools the instruction",
        [
            replace(prompt, pooled=(min(1, prompt.pooled[0]), prompt.pooled[1])) if canary.instruction else prompt
            for canary, prompt in zip(canaries, subject.prompts, strict=True)
        ],
    )
    prompts = encoder.prompts
    if not isinstance(prompts, DefaultPrompts):
        return
    longest = encoder.max_length
    for length in sorted({*(k for k in _TRUNCATIONS if k < longest), longest - 2, longest - 1}):
        short = prompts.at_most(length)
        yield f"cuts texts at {length} tokens", [short.build([c.text], c.instruction)[0] for c in canaries]
    template = template_for(encoder.checkpoint.trained_as, encoder.checkpoint.encoder_config)
    if template.prefix or template.suffix:
        closes = encoder.pooling == "eos_token"
        bare = DefaultPrompts(encoder.checkpoint.tokenizer, Template(), longest, closes, prompts.skip_instruction)
        yield "leaves out the chat template", [bare.build([c.text], c.instruction)[0] for c in canaries]


def _vectors_of(subject: _Subject, prompts: Sequence[Prompt]) -> np.ndarray:
    """Return vectors of length 1 of changed prompts; prompts that did not change are not computed again."""
    vectors = subject.vectors.copy()
    changed = [
        row
        for row, (prompt, right) in enumerate(zip(prompts, subject.prompts, strict=True))
        if prompt.pooled != right.pooled or not np.array_equal(prompt.ids, right.ids)
    ]
    if changed:
        vectors[changed] = subject.encoder.encode_prompts([prompts[row] for row in changed])
    return unit_length(vectors, in_float64=True)


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(character for character in decomposed if not unicodedata.combining(character))
