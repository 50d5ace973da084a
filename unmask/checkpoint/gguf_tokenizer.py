"""Build a tokenizer from a GGUF header. It gives the same ids as the model's own `tokenizer.json`.

A header holds tokens, their types, and merges (`gpt2`) or scores (`llama`, which is SentencePiece BPE). It does not
hold the pre-tokeniser, which splits text before the merges, but only its name: `tokenizer.ggml.pre`. The table here has
the rules for each name.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.errors import CheckpointError

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NEVER_JOINED = (_UNKNOWN, _CONTROL, _BYTE)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's spelling of a space


@dataclass(frozen=True)
class _Pre:
    """Pre-tokeniser: the rules by which a byte-level tokenizer splits text into words. Merges stay within a word.

    Attributes:
        splits: regular expressions, applied in order; each match becomes a piece of its own.
        digits: every digit is a piece, after the splits.
        gpt2: the expression of GPT-2 is applied last.
        nfc: text is composed (Unicode NFC) first.
        ignore_merges: a word that is a token as a whole becomes that token, whatever the merges give.
        add_bos: add BOS before every text if the header does not decide it.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters with case, as of one Unicode version. Those that an editor might compose (NFC) are spelled out.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")

# tokenizer.ggml.pre, as named by https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf_update.py.
# A file without this field is older than the field; GPT-2's pre-tokeniser is then the best guess.
_PRE = {
    "default": _Pre(gpt2=True),
    "gpt-2": _Pre(gpt2=True),
    "smollm": _Pre(digits=True, gpt2=True),
    "starcoder": _Pre(digits=True, gpt2=True),
    "refact": _Pre(digits=True, gpt2=True),
    "llama-bpe": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama3": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-v3": _Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "smaug-bpe": _Pre((_LLAMA3,)),
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen2": _Pre((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": _Pre((_QWEN2,), nfc=True),
    "qwen35": _Pre((_QWEN35,), nfc=True),
    "deepseek-llm": _Pre(_DEEPSEEK_LLM, digits=True),
    "deepseek-coder": _Pre(_DEEPSEEK_CODER, digits=True),
}


def build_tokenizer(file: Path, fields: Mapping[str, Any]) -> TextTokenizer:
    """Build the tokenizer from the header fields `tokenizer.ggml.*`. Messages name `file`.

    Raises:
        CheckpointError: a field is missing or damaged, or names a tokenizer that is not known here.
    """
    model = fields.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in _BUILDERS:
        raise CheckpointError(f"{file} has the tokenizer {model!r}; a .gguf file can have {', '.join(_BUILDERS)}")
    vocabulary = _Vocabulary(file, fields)
    try:
        tokenizer, add_bos = _BUILDERS[model](vocabulary)
        tokenizer.add_tokens(vocabulary.added())
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises bare Exception for every fault
        raise CheckpointError(f"{file} is damaged: no tokenizer can be made of its tokens ({error})") from error
    bos_id, eos_id = vocabulary.id_in("bos_token_id"), vocabulary.id_in("eos_token_id")
    return TextTokenizer(
        tokenizer,
        bos_id,
        eos_id,
        prefix=(bos_id,) if vocabulary.flag("add_bos_token", add_bos) and bos_id is not None else (),
        suffix=(eos_id,) if vocabulary.flag("add_eos_token", False) and eos_id is not None else (),
    )


class _Vocabulary:
    """Tokens of a header with their types and scores, checked."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self.file, self._fields = file, fields
        self.tokens = list(self.texts("tokens"))
        kinds = self.numbers("token_type")
        self.kinds: list[int] = [_NORMAL] * len(self.tokens) if kinds is None else kinds.astype(int).tolist()

    def texts(self, name: str) -> list[str]:
        value = self._fields.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list):
            raise CheckpointError(f"{self.file} has no list of texts tokenizer.ggml.{name}")
        return value

    def numbers(self, name: str) -> np.ndarray | None:
        """Read one number for each token; None if the file has no such list."""
        value = self._fields.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise CheckpointError(f"{self.file} is damaged: tokenizer.ggml.{name} is not one number for each token")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(f"tokenizer.ggml.{name}")
        return value if isinstance(value, bool) else default

    def id_in(self, name: str) -> int | None:
        value = self._fields.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise CheckpointError(f"{self.file} is damaged: tokenizer.ggml.{name} is {value!r}, not a token's id")
        return value

    @property
    def pre(self) -> _Pre:
        name = self._fields.get("tokenizer.ggml.pre", "default")
        if not isinstance(name, str) or name not in _PRE:
            raise CheckpointError(f"{self.file} splits text by the rule {name!r}; known are {', '.join(_PRE)}")
        return _PRE[name]

    def mark_spaces(self) -> None:
        """Write runs of spaces with SentencePiece's mark. The converter wrote Gemma's runs as plain spaces."""
        for index, token in enumerate(self.tokens):
            if self.kinds[index] == _USER_DEFINED and not token.strip(" "):
                self.tokens[index] = _SPACE * len(token)

    def ids(self, *, without: int | None = None) -> dict[str, int]:
        """Return token -> id, without empty tokens, which no text gives, and without tokens of type `without`."""
        pairs = [(token, index) for index, token in enumerate(self.tokens) if token and self.kinds[index] != without]
        ids = dict(pairs)
        if len(ids) != len(pairs):
            raise CheckpointError(f"{self.file} is damaged: its vocabulary has {len(pairs) - len(ids)} tokens twice")
        return ids

    def added(self) -> list[AddedToken]:
        """Return the tokens that are matched in the text before it is normalised or split."""
        return [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]


def rule_names(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Names for `tokenizer.ggml.pre` whose rule splits these texts as a byte-level tokenizer does, the first the best.

    "default" is left out: llama.cpp splits by another rule under that name.
    """
    if tokenizer.pre_tokenizer is None:
        return []
    normalizer = tokenizer.normalizer
    normalized = [normalizer.normalize_str(text) if normalizer is not None else text for text in texts]
    own = [tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in normalized]
    names = []
    for name, pre in _PRE.items():
        composed = [unicodedata.normalize("NFC", text) if pre.nfc else text for text in texts]
        if name != "default" and composed == normalized:
            rule = _pre_tokenizer(pre)
            splits = [rule.pre_tokenize_str(text) for text in normalized]
            if [[piece for piece, _ in text] for text in splits] == [[piece for piece, _ in text] for text in own]:
                names.append(name)
    return names


def _pre_tokenizer(pre: _Pre) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits
    ]
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2))
    return pre_tokenizers.Sequence(steps)


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    pre = vocabulary.pre
    merges = [(left, right) for left, _, right in (text.partition(" ") for text in vocabulary.texts("merges"))]
    # Unused tokens pad the vocabulary to the embedding's rows; the model's own tokenizer does not have them.
    model = BPE(vocabulary.ids(without=_UNUSED), merges, ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre.add_bos


def _sentence_piece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    vocabulary.mark_spaces()
    ids = vocabulary.ids()
    unknown = vocabulary.id_in("unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            ids,
            _merges(vocabulary, ids),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_spaces: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    to_marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if vocabulary.flag("add_space_prefix", True):
        to_marks.insert(0, normalizers.Prepend(_SPACE))
        to_spaces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_marks)
    tokenizer.decoder = decoders.Sequence(to_spaces)
    return tokenizer, True


def _merges(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, in the order in which SentencePiece joins them.

    SentencePiece joins the pair whose result has the highest score, and of equals the leftmost. All runs of spaces have
    the same score. Ranking a longer left half higher makes them grow from the left, as in SentencePiece.
    """
    scores = vocabulary.numbers("scores")
    # User-defined pieces are matched before any joining, and the header has lost their scores.
    rank = (-np.arange(len(vocabulary.tokens)) if scores is None else scores).astype(np.float64)
    rank[np.array(vocabulary.kinds) == _USER_DEFINED] = np.inf
    joined = {token: index for token, index in ids.items() if vocabulary.kinds[index] not in _NEVER_JOINED}
    merges: list[tuple[str, str]] = []
    results: list[int] = []
    for token, index in joined.items():
        for cut in range(1, len(token)):
            if (left := token[:cut]) in joined and (right := token[cut:]) in joined:
                merges.append((left, right))
                results.append(index)
    left_lengths = np.fromiter((len(left) for left, _ in merges), np.int64, len(merges))
    right_lengths = np.fromiter((len(right) for _, right in merges), np.int64, len(merges))
    order = np.lexsort((-right_lengths, -left_lengths, -rank[results]))  # the last key decides first
    return [merges[position] for position in order.tolist()]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece}
