"""Prompts: text to token ids and pooled positions.

A prompt reads `BOS, template prefix, instruction, text, template suffix`. All of it is attended to; the vector is
made from the text and the closing template tokens, as LLM2Vec was trained, never from BOS or the instruction.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.encoder.templates import Template
from unmask.errors import CheckpointError, EmptyText, InputError, InstructionTooLong, TextTooLong


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence, ready for the forward.

    Attributes:
        ids: token ids, int64 [length].
        pooled: first and one-past-last position that the pooling may use.
        full_length: what the length would have been without truncation.
    """

    ids: np.ndarray
    pooled: tuple[int, int]
    full_length: int

    @property
    def truncated(self) -> bool:
        return self.full_length > len(self.ids)


class PromptBuilder(Protocol):
    """Text handling: `DefaultPrompts`, or `ReferencePrompts` for the published LLM2Vec vectors.

    Attributes:
        skip_instruction: the instruction is left out of the pooled positions.
    """

    skip_instruction: bool

    def build(
        self, texts: Sequence[str], instruction: str = "", truncate: bool = True, first: int = 0
    ) -> list[Prompt]: ...

    def lengths(self, texts: Sequence[str], instruction: str = "") -> list[int]: ...


@dataclass(frozen=True)
class PromptParts:
    """Everything of a prompt but instruction and text, as another runtime must add it.

    Attributes:
        bos: ids that begin every sequence: a part of `head`.
        head: ids before the text, BOS and special tokens of the template.
        plain_head, plain_tail: text that is tokenised together with instruction and text.
        tail: ids behind the text.
        strips: blanks around a text are removed.
    """

    bos: tuple[int, ...]
    head: tuple[int, ...]
    plain_head: str
    plain_tail: str
    tail: tuple[int, ...]
    strips: bool


class DefaultPrompts:
    """Token-exact prompts: nothing in a user's text can act as a separator, a special token or an instruction.

    Args:
        tokenizer: of the model; special tokens are recognised in the template, and not in a user's text.
        template: text before and after the user's.
        max_length: tokens a prompt may have, everything included.
        close_with_eos: append EOS, for `eos_token` pooling.
        skip_instruction: leave the instruction out of the pooled positions.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template,
        max_length: int,
        close_with_eos: bool = False,
        skip_instruction: bool = True,
    ) -> None:
        # In `plain`, `<|im_end|>` in a text is ten characters, not a control token.
        self._tokenizer = tokenizer.plain
        self._highest_id = tokenizer.highest_id
        self._max_length = max_length
        self.skip_instruction = skip_instruction
        self._templated = bool(template.prefix or template.suffix)
        head, self._plain_head = _split_specials(tokenizer.text, template.prefix, plain_last=True)
        tail, self._plain_tail = _split_specials(tokenizer.text, template.suffix, plain_last=False)
        self._bos = list(tokenizer.prefix)
        self._head = self._bos + head
        if self._bos and head[: len(self._bos)] == self._bos:
            self._head = head  # a template that spells BOS out must not give it twice
        self._tail = tail + list(tokenizer.suffix)
        if close_with_eos and not template.closes and tokenizer.eos_id is not None and not tokenizer.suffix:
            self._tail.append(tokenizer.eos_id)

    @property
    def parts(self) -> PromptParts:
        """The fixed parts of every prompt."""
        return PromptParts(
            tuple(self._bos),
            tuple(self._head),
            self._plain_head,
            self._plain_tail,
            tuple(self._tail),
            self._templated,
        )

    def opening(self, instruction: str) -> str:
        """Text before a text: template and instruction, as one string with their blanks."""
        return self._opening(instruction)

    def build(self, texts: Sequence[str], instruction: str = "", truncate: bool = True, first: int = 0) -> list[Prompt]:
        """One prompt per text. `first` is the first one's index, for errors.

        Raises:
            EmptyText: a text has no token of its own.
            TextTooLong: a prompt exceeds max_length and `truncate` is off.
            InstructionTooLong: no room is left for any text.
        """
        opening = self._opening(instruction)
        bodies = [self._body(text) for text in texts]
        strings = [opening + body + self._plain_tail for body in bodies]
        if not opening and not self._plain_tail:
            encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
            spans = [(0, len(encoding.ids)) for encoding in encodings]
        else:
            encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
            start = len(opening)
            spans = [
                _span(encoding, start, start + len(body)) for encoding, body in zip(encodings, bodies, strict=True)
            ]
        skipped = self._skipped_tokens(instruction)
        return [
            self._assemble(index, encoding.ids, span, truncate, skipped)
            for index, (encoding, span) in enumerate(zip(encodings, spans, strict=True), first)
        ]

    def build_from_ids(
        self, sequences: Sequence[Sequence[int]], instruction: str = "", truncate: bool = True
    ) -> list[Prompt]:
        """Prompts around texts that are already the model's own ids. A leading BOS of theirs is not doubled.

        Raises: as `build`, and InputError if an id is not in the vocabulary.
        """
        opening, skipped = self._opening(instruction), self._skipped_tokens(instruction)
        before = self._tokenizer.encode(opening, add_special_tokens=False).ids if opening else []
        after = self._tokenizer.encode(self._plain_tail, add_special_tokens=False).ids if self._plain_tail else []
        prompts = []
        for index, sequence in enumerate(sequences):
            ids = list(sequence)
            unknown = next((token for token in ids if not 0 <= token <= self._highest_id), None)
            if unknown is not None:
                raise InputError(f"input {index} has token id {unknown}; the model's end at {self._highest_id}", index)
            if self._bos and ids[: len(self._bos)] == self._bos:
                ids = ids[len(self._bos) :]
            span = (len(before), len(before) + len(ids))
            prompts.append(self._assemble(index, [*before, *ids, *after], span, truncate, skipped))
        return prompts

    def at_most(self, max_length: int) -> "DefaultPrompts":
        """The same prompts, cut at another length."""
        other = copy.copy(self)
        other._max_length = max_length
        return other

    def lengths(self, texts: Sequence[str], instruction: str = "") -> list[int]:
        """Tokens of each prompt before any truncation, everything counted."""
        opening = self._opening(instruction)
        strings = [opening + self._body(text) + self._plain_tail for text in texts]
        fixed = len(self._head) + len(self._tail)
        return [fixed + len(e.ids) for e in self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)]

    def _opening(self, instruction: str) -> str:
        instruction = instruction.strip()
        return self._plain_head + (f"{instruction} " if instruction else "")

    def _body(self, text: str) -> str:
        return text.strip() if self._templated else text

    def _skipped_tokens(self, instruction: str) -> int | None:
        """Tokens at the beginning of a prompt that are not pooled; None: all before the text, or BOS alone."""
        return None

    def _assemble(
        self, index: int, ids: list[int], span: tuple[int, int], truncate: bool, skipped: int | None
    ) -> Prompt:
        start, stop = span
        if stop <= start:
            raise EmptyText(f"input {index} is empty: it has no token to make a vector from", index)
        full = len(self._head) + len(ids) + len(self._tail)
        if full > self._max_length:
            room = stop - start - (full - self._max_length)
            if room < 1:
                raise InstructionTooLong(
                    f"the instruction and template take {full - (stop - start)} tokens and leave no room for text "
                    f"within the model's {self._max_length}"
                )
            if not truncate:
                raise TextTooLong(
                    f"This model's maximum context length is {self._max_length} tokens, however you requested "
                    f"{full} tokens (input {index}). Shorten it, or ask for truncation.",
                    index,
                )
            ids = ids[: start + room] + ids[stop:]
        whole = self._head + ids + self._tail
        first = skipped
        if first is None:
            first = len(self._head) + start if self.skip_instruction else len(self._bos)
        if first >= len(whole):
            raise EmptyText(f"input {index} is empty: it has no token to make a vector from", index)
        return Prompt(np.array(whole, dtype=np.int64), (first, len(whole)), full)


class SentencePrompts(DefaultPrompts):
    """Prompts as sentence-transformers makes them: instruction and text are one string, joined as they are.

    All tokens are pooled, BOS and EOS too, or all after the instruction's. Where the instruction ends in a space, the
    library counts one token too many, since the space then belongs to the first word; so it is counted here.

    As in `DefaultPrompts`, the characters of a text are never a control token; the library reads `</s>` as one.

    Args:
        include_instruction: the instruction is pooled too.
        instructions: the model's own, by name.
        default: stands before texts without an instruction.

    Raises:
        CheckpointError: one of the model's own instructions holds a special token.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        max_length: int,
        include_instruction: bool = True,
        instructions: Mapping[str, str] | None = None,
        default: str = "",
    ) -> None:
        super().__init__(tokenizer, Template(), max_length, skip_instruction=not include_instruction)
        specials = [token.content for token in tokenizer.text.get_added_tokens_decoder().values() if token.special]
        for name, text in (instructions or {}).items():
            if special := next((special for special in specials if special in text), None):
                raise CheckpointError(
                    f"the prompt {name} holds the special token {special}, which unmask does not read"
                )
        self._special_ids = {tokenizer.text.token_to_id(special) for special in specials}
        self._default = default

    def _opening(self, instruction: str) -> str:
        return instruction or self._default

    def _skipped_tokens(self, instruction: str) -> int | None:
        opening = self._opening(instruction)
        if not self.skip_instruction or not opening:
            return 0
        ids = [*self._bos, *self._tokenizer.encode(opening, add_special_tokens=False).ids, *self._tail]
        return len(ids) - (ids[-1] in self._special_ids)


def _span(encoding: Encoding, start: int, stop: int) -> tuple[int, int]:
    """Positions of the tokens that cover characters [start, stop).

    A token that begins in the joining space belongs to the text if it reaches into it, which is how a byte-level
    BPE writes the first word.
    """
    if stop <= start:
        return (0, 0)
    first, last = None, 0
    for position, (begin, end) in enumerate(encoding.offsets):
        if first is None and end > start:
            first = position
        if begin < stop:
            last = position + 1
    return (0, 0) if first is None else (first, last)


def _split_specials(tokenizer: Tokenizer, part: str, plain_last: bool) -> tuple[list[int], str]:
    """Ids of a template part up to its outermost special token, and the plain rest, tokenised with the text."""
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if plain_last:
        cut = max((part.rfind(s) + len(s) for s in specials if s in part), default=0)
        fixed, plain = part[:cut], part[cut:]
    else:
        cut = min((part.find(s) for s in specials if s in part), default=len(part))
        plain, fixed = part[:cut], part[cut:]
    return (tokenizer.encode(fixed, add_special_tokens=False).ids if fixed else []), plain
