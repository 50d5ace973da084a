"""Tokenizer of a model: the `tokenizers` object and the special ids that encoding needs."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from unmask.errors import CheckpointError

# Classes that rebuild the post-processor from these two flags; for the others tokenizer.json decides alone.
_FLAGGED_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")
# Code that some makers ship with their weights (gte-Qwen1.5, gte-Qwen2): Qwen2's tokenizer, whose post-processor it
# rebuilds from `add_eos_token` alone. transformers 5 drops the flag; vLLM and Text Embeddings Inference follow it.
_EOS_FLAGGED_CODE = "tokenization_qwen.Qwen2Tokenizer"


# Characters with a meaning in a regular expression of Onigmo and of JavaScript.
_REGEX_SIGNS = re.compile(r"[\\^$.*+?()\[\]{}|/]")


@dataclass(frozen=True)
class TextTokenizer:
    """`tokenizers.Tokenizer` without its post-processor: specials are added where the prompt is built, and character
    offsets stay exact (a byte-level post-processor would trim white space from them).

    Attributes:
        text: turns text into ids, without adding any. Control tokens in a text count as such; see `plain`.
        bos_id, eos_id: ids of these tokens, where the model has them.
        prefix, suffix: ids that the model expects around every sequence (usually BOS alone, and nothing).
    """

    text: Tokenizer
    bos_id: int | None
    eos_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @cached_property
    def plain(self) -> Tokenizer:
        """Return a copy of `text` that reads control tokens such as `<|im_end|>` in a text as ordinary characters.

        The copy shares the vocabulary and the merges with `text`, which are most of its memory.
        """
        plain = Tokenizer(self.text.model)
        plain.normalizer = self.text.normalizer
        plain.pre_tokenizer = self.text.pre_tokenizer
        plain.decoder = self.text.decoder
        added = sorted(self.text.get_added_tokens_decoder().items())
        for special, tokens in groupby((token for _, token in added), key=lambda token: token.special):
            (plain.add_special_tokens if special else plain.add_tokens)(list(tokens))
        if repr(plain.get_added_tokens_decoder()) != repr(self.text.get_added_tokens_decoder()):
            plain = Tokenizer.from_str(self.text.to_str())  # ids with a gap: copy everything
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def highest_id(self) -> int:
        """Return the largest id that a text can produce; the embedding needs a row for it."""
        return max(self.text.get_vocab(with_added_tokens=True).values(), default=-1)

    def has_tokens_of(self, other: "TextTokenizer") -> bool:
        """True if both have the same tokens under the same ids, and match the same added ones in a text."""
        vocabularies = [tokenizer.text.get_vocab(with_added_tokens=True) for tokenizer in (self, other)]
        return vocabularies[0] == vocabularies[1] and self._added() == other._added()

    def _added(self) -> set[str]:
        """Added tokens that a user's text can hold; control tokens are read as ordinary characters."""
        return {token.content for token in self.text.get_added_tokens_decoder().values() if not token.special}


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SPECIAL_TOKENS = "special_tokens_map.json"


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Read the tokenizer of a hub-layout folder: `tokenizer.json`, or a SentencePiece `tokenizer.model` to convert.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    named = {**_read_json(folder / _SPECIAL_TOKENS), **settings}
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _convert_sentencepiece(folder)
    else:
        raise CheckpointError(f"{folder} has no tokenizer: looked for tokenizer.json and tokenizer.model")
    tokenizer = _without_prompt_rules(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bos_id = _id_of(tokenizer, named.get("bos_token"))
    eos_id = _id_of(tokenizer, named.get("eos_token"))
    prefix, suffix = _added_around(tokenizer)
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue] - the stub forgets None
    is_flagged = str(settings.get("tokenizer_class", "")).startswith(_FLAGGED_CLASSES)
    is_eos_flagged = any(name.startswith(_EOS_FLAGGED_CODE) for name in own_classes(settings))
    if is_flagged and isinstance(settings.get("add_bos_token"), bool):
        prefix = (bos_id,) if settings["add_bos_token"] and bos_id is not None else ()
    if (is_flagged or is_eos_flagged) and isinstance(settings.get("add_eos_token"), bool):
        suffix = (eos_id,) if settings["add_eos_token"] and eos_id is not None else ()
    return TextTokenizer(tokenizer, bos_id, eos_id, prefix, suffix)


def own_classes(settings: Mapping[str, Any]) -> list[str]:
    """Names of the classes in a model's own code, `module.Class`, that `auto_map` of a configuration file lists."""
    table = settings.get("auto_map")
    values = table.values() if isinstance(table, Mapping) else [table]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    return [str(name).rpartition("--")[2] for name in names]  # "repository--module.Class" names another repository


def special_tokens_files(folder: Path, tokenizer: TextTokenizer) -> list[Path]:
    """Return `special_tokens_map.json` if it alone names BOS or EOS, else nothing: it belongs to the revision then.

    Args:
        folder: the tokenizer's.
        tokenizer: as read from it.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    decides = any(token is not None and key not in settings for key, token in ids.items())
    return [folder / _SPECIAL_TOKENS] if decides else []


def prompt_rule(prompt: str) -> dict[str, Any]:
    """Make a normaliser by which sentence-transformers counts the tokens of a prompt right.

    That library tokenises a prompt alone. Its last space becomes a token of its own there, but belongs to the first
    word where a text follows. The rule takes that space away from a text that is the prompt and nothing else. The
    pattern is one that JavaScript reads as well, for transformers.js. `^` and `$` would not do: they also match at the
    line breaks inside a text.

    Args:
        prompt: ends in a space.
    """
    pattern = _REGEX_SIGNS.sub(r"\\\g<0>", prompt[:-1])
    return {"type": "Replace", "pattern": {"Regex": rf"(?<![\s\S]){pattern} (?![\s\S])"}, "content": prompt[:-1]}


def _without_prompt_rules(tokenizer: Tokenizer) -> Tokenizer:
    """Remove the normalisers of `prompt_rule`: no text may depend on them here."""
    if tokenizer.normalizer is None:
        return tokenizer
    state = json.loads(tokenizer.normalizer.__getstate__())
    steps = state.get("normalizers", [state])
    others = [step for step in steps if not _is_prompt_rule(step)]
    if len(others) == len(steps):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = {"type": "Sequence", "normalizers": others} if len(others) > 1 else next(iter(others), None)
    return Tokenizer.from_str(json.dumps(content))


def _is_prompt_rule(step: dict[str, Any]) -> bool:
    content = step.get("content")
    return step.get("type") == "Replace" and bool(content) and step == prompt_rule(f"{content} ")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _id_of(tokenizer: Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(content) if isinstance(content, str) else None


def _added_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before and after a text, from a trial."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _convert_sentencepiece(folder: Path) -> Tokenizer:
    try:
        from transformers.models.auto.tokenization_auto import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.model'} could not be converted ({error}); "
            "save a tokenizer.json beside it (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        ) from error
