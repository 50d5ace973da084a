"""The text handling of the published LLM2Vec package, quirk for quirk (llm2vec.py at 312adcf, v0.2.3).

Kept apart because nothing here is how one would write it: documents are shortened by white-space words until they
have at most 400 tokens, instruction and text are told apart by a separator that users can type, special tokens in
user text count as such, and the pooled positions are counted from the end by tokenising the text a second time.
Vectors of the published models depend on all of it.

One thing is not reproduced: a text that ends up with no token of its own. The reference then averages the whole
padded row, so the vector depends on what else was in the batch; here it is an error.
"""

from collections.abc import Sequence

import numpy as np

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.encoder.prompts import Prompt
from unmask.encoder.templates import Template
from unmask.errors import EmptyText, TextTooLong

SEPARATOR = "!@#$%^&*()"

# What `eos_token` pooling appends, by model_type, where the template names nothing else.
_EOS_TEXT = {"llama": " </s>", "mistral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}


class ReferencePrompts:
    """Prompts exactly as the reference makes them.

    Args:
        doc_max_length: tokens above which a text is shortened by words, instruction not counted (400 as published).
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template,
        max_length: int,
        doc_max_length: int = 400,
        model_type: str = "llama",
        close_with_eos: bool = False,
        skip_instruction: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_length = max_length
        self._doc_max_length = doc_max_length
        self.skip_instruction = skip_instruction
        appended = template.eos or _EOS_TEXT.get(model_type)
        self._eos_text = appended if close_with_eos and not template.closes else None

    def build(self, texts: Sequence[str], instruction: str = "", truncate: bool = True, first: int = 0) -> list[Prompt]:
        """Return one prompt per text. `first` is the first one's index, for errors.

        Raises:
            EmptyText: no token is left to pool (the reference would return a batch-dependent vector).
            TextTooLong: a text would be shortened and `truncate` is off.
        """
        return [self._build_one(index, text, instruction, truncate) for index, text in enumerate(texts, first)]

    def lengths(self, texts: Sequence[str], instruction: str = "") -> list[int]:
        """Return the number of tokens of each prompt before shortening or truncation."""
        around = len(self._tokenizer.prefix) + len(self._tokenizer.suffix)
        return [around + len(self._ids("".join(self._marked(text, instruction).split(SEPARATOR)))) for text in texts]

    def _build_one(self, index: int, text: str, instruction: str, truncate: bool) -> Prompt:
        shortened = self._shorten(text)
        parts = self._marked(shortened, instruction).split(SEPARATOR)
        whole = self._ids("".join(parts))
        prefix, suffix = list(self._tokenizer.prefix), list(self._tokenizer.suffix)
        room = self._max_length - len(prefix) - len(suffix)
        ids = prefix + whole[:room] + suffix
        pooled = min(len(self._ids(parts[1])), self._max_length, len(ids))
        if pooled == 0:
            raise EmptyText(
                f"input {index} has no token left to pool; the reference would average its padded row, "
                "which depends on the rest of the batch",
                index,
            )
        full = len(prefix) + len(suffix) + len(whole)
        if shortened != text:
            full = max(full, len(ids) + 1)
        if full > len(ids) and not truncate:
            raise TextTooLong(
                f"input {index} is longer than the reference's limits ({self._doc_max_length} tokens of text, "
                f"{self._max_length} in all). Shorten it, or ask for truncation.",
                index,
            )
        start = len(ids) - pooled if self.skip_instruction else 0
        return Prompt(np.array(ids, dtype=np.int64), (start, len(ids)), full)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.text.encode(text).ids

    def _shorten(self, text: str) -> str:
        """`_convert_to_str`: drop words in proportion until at most doc_max_length tokens are left."""
        length = min(len(self._ids(text)), self._max_length)
        while length > self._doc_max_length:
            words = text.split()
            text = " ".join(words[: int(len(words) * (self._doc_max_length / length))])
            length = min(len(self._ids(text)), self._max_length)
        return text

    def _marked(self, text: str, instruction: str) -> str:
        """Return the string with its separator and template, as `_convert_to_str` and `prepare_for_tokenization` do."""
        marked = f"{instruction.strip()} {SEPARATOR}{text}" if instruction else f"{SEPARATOR}{text}"
        if self._template.prefix or self._template.suffix:
            marked = f"{self._template.prefix}{marked.strip()}{self._template.suffix}"
        return f"{marked.strip()}{self._eos_text}" if self._eos_text else marked
