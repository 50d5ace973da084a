"""Tokenizers out of GGUF headers: the ids are those of the model's own tokenizer, or of SentencePiece itself."""

import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.checkpoint import gguf_tokenizer
from unmask.checkpoint.gguf import _read_header
from unmask.checkpoint.gguf_tokenizer import build_tokenizer
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.errors import CheckpointError

FILE = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = [
    "Hello world, it's WE'LL they'd",
    " leading",
    "  two leading and trailing  ",
    "a\nb\n\n\nc\r\n\ttab\t\tx",
    "1234567890 12 3.14",
    "def f(x):\n    return x**2\n\n\n        y = 1",
    "日本語のテキスト、中文字符。한국어 العربية हिन्दी",
    "e\u0301migre\u0301 naïve ﬁ İstanbul ß",
    "😀👩‍👩‍👧‍👦🇩🇪 \u200b\ufeff\U000e0001",
    " " * 5 + "x" + " " * 31 + "y" + " " * 40 + "z",
    "=" * 77 + "-" * 9,
    "\n" * 40,
    "\x00\x01\x7f",
    "",
]


def byte_level_fields(pre: str, **more: Any) -> dict[str, Any]:
    """A byte-level vocabulary whose only merges join digits and the letters of a few words."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["1 2", "12 3", "a b", "Ġ ab", "Ã ©"]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "xyz", "<think>", "[PAD]", "<|end|>"]
    kinds = [NORMAL] * (len(tokens) - 3) + [USER_DEFINED, UNUSED, CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


@cache
def byte_level(pre: str) -> TextTokenizer:
    return build_tokenizer(FILE, byte_level_fields(pre))


def spm_fields(pieces: dict[str, float], **more: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, BOS, EOS, the bytes, then these pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


def pieces_of(tokenizer: TextTokenizer, text: str) -> list[str]:
    return tokenizer.text.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "123 ab", ["123", "Ġab"]),
        ("default", "123 ab", ["123", "Ġab"]),
        ("smollm", "123 ab", ["1", "2", "3", "Ġab"]),
        ("smollm", "ab12", ["ab", "1", "2"]),
        ("starcoder", "123", ["1", "2", "3"]),
        ("refact", "123", ["1", "2", "3"]),
        ("qwen2", "123 ab", ["1", "2", "3", "Ġab"]),
        ("qwen2", "e\u0301", ["Ã©"]),
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
        ("qwen35", "123", ["1", "2", "3"]),
        ("llama-bpe", "123 ab", ["123", "Ġab"]),
        ("llama-bpe", "xyz", ["xyz"]),  # no merge makes it, and it is a token
        ("smaug-bpe", "xyz", ["x", "y", "z"]),
        ("tekken", "xyz12", ["xyz", "1", "2"]),
        ("deepseek-llm", "ab123", ["ab", "1", "2", "3"]),
        ("deepseek-llm", " ab\n", ["Ġab", "Ċ"]),
        ("deepseek-coder", "ab123", ["ab", "1", "2", "3"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(pre: str, text: str, pieces: list[str]) -> None:
    assert pieces_of(byte_level(pre), text) == pieces


def test_splitting_rules_are_those_of_transformers() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    splits = mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = splits.keys() & gguf_tokenizer._PRE.keys()
    assert len(shared) >= 8
    for name in shared:
        assert gguf_tokenizer._PRE[name].splits == (splits[name],), name


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer._PRE))
@given(text=st.text(max_size=40))
@settings(max_examples=25)
def test_byte_level_tokens_hold_the_whole_text(pre: str, text: str) -> None:
    tokenizer = byte_level(pre).text
    expected = unicodedata.normalize("NFC", text) if gguf_tokenizer._PRE[pre].nfc else text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == expected


def test_added_tokens_are_found_whole_and_padding_is_not_a_token() -> None:
    fields = byte_level_fields("qwen2")
    tokenizer = build_tokenizer(FILE, fields)
    assert pieces_of(tokenizer, "ab<think>ab<|end|>") == ["ab", "<think>", "ab", "<|end|>"]
    assert tokenizer.text.token_to_id("[PAD]") is None
    added = tokenizer.text.get_added_tokens_decoder().values()
    assert {token.content: token.special for token in added} == {"<think>": False, "<|end|>": True}
    assert tokenizer.text.post_processor is None


@pytest.mark.parametrize(
    ("fields", "prefix", "suffix"),
    [
        (byte_level_fields("qwen2"), False, False),
        (byte_level_fields("llama-bpe"), True, False),
        (byte_level_fields("tekken"), True, False),
        (byte_level_fields("llama-bpe", add_bos_token=False), False, False),
        (byte_level_fields("smollm", add_bos_token=True, add_eos_token=True), True, True),
        (spm_fields({"▁": -1.0}), True, False),
        (spm_fields({"▁": -1.0}, add_bos_token=False, add_eos_token=True), False, True),
    ],
)
def test_what_goes_around_a_text(fields: dict[str, Any], prefix: bool, suffix: bool) -> None:
    tokenizer = build_tokenizer(FILE, fields)
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    assert tokenizer.prefix == ((tokenizer.bos_id,) if prefix else ())
    assert tokenizer.suffix == ((tokenizer.eos_id,) if suffix else ())


def test_sentencepiece_marks_spaces_and_falls_back_to_bytes() -> None:
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "ab": -1.0, "▁a": -2.0, "▁ab": -3.0, "▁▁": -1e9}
    llama = build_tokenizer(FILE, spm_fields(pieces))
    assert pieces_of(llama, "ab") == ["▁ab"]
    assert pieces_of(llama, " ab") == ["▁", "▁ab"]
    assert pieces_of(llama, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert llama.text.decode(llama.text.encode(" ab é").ids) == " ab é"
    gemma = build_tokenizer(FILE, spm_fields(pieces, add_space_prefix=False))
    assert pieces_of(gemma, "ab") == ["ab"]
    assert pieces_of(gemma, "  ab") == ["▁", "▁ab"]
    assert gemma.text.decode(gemma.text.encode(" ab é").ids) == " ab é"


def test_user_defined_runs_of_spaces_come_before_any_merge() -> None:
    pieces = {"  ": -1000.0, "   ": -1000.0, "▁": -9.0, "a": -9.0, "▁a": 0.0}
    fields = spm_fields(pieces, add_space_prefix=False)
    fields["tokenizer.ggml.token_type"][259:261] = USER_DEFINED
    tokenizer = build_tokenizer(FILE, fields)
    assert pieces_of(tokenizer, "a   a a") == ["a", "▁▁▁", "a", "▁a"]
    assert pieces_of(tokenizer, " " * 8) == ["▁▁▁", "▁▁▁", "▁▁"]


def test_without_scores_the_order_of_the_vocabulary_decides() -> None:
    fields = spm_fields(dict.fromkeys(["▁", "a", "b", "c", "bc", "ab"], 0.0), add_space_prefix=False)
    del fields["tokenizer.ggml.scores"]
    assert pieces_of(build_tokenizer(FILE, fields), "abc") == ["a", "bc"]


@given(
    pieces=st.lists(st.text("ab▁", min_size=1, max_size=5), unique=True, min_size=1, max_size=20),
    data=st.data(),
)
@settings(max_examples=200)
def test_merges_are_those_that_transformers_extracts(pieces: list[str], data: st.DataObject) -> None:
    from transformers.tokenization_utils_base import generate_merges

    scores = data.draw(st.lists(st.integers(-4, 0), min_size=len(pieces), max_size=len(pieces)))
    fields = spm_fields(dict(zip(pieces, map(float, scores), strict=True)))
    vocabulary = gguf_tokenizer._Vocabulary(FILE, fields)
    ids = vocabulary.ids()
    expected = generate_merges(ids, dict(zip(vocabulary.tokens, [0.0] * 259 + scores, strict=True)))
    merges = gguf_tokenizer._merges(vocabulary, ids)
    # Where scores and lengths are all equal, neither order means anything.
    key = {pair: (dict(zip(pieces, scores, strict=True))["".join(pair)], *map(len, pair)) for pair in merges}
    assert sorted(merges) == sorted(expected)
    assert [key[pair] for pair in merges] == [key[pair] for pair in expected]


def sentencepiece(text: str, fields: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as published: join the adjacent pair of the best score, the leftmost of equals."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"].tolist()
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] in (NORMAL, USER_DEFINED)}
    scores = fields["tokenizer.ggml.scores"].tolist()
    parts = list(text)
    while True:
        best = None
        for position, pair in enumerate(pairwise(parts)):
            index = ids.get("".join(pair))
            if index is not None and (best is None or scores[index] > best[0]):
                best = scores[index], position
        if best is None:
            break
        position = best[1]
        parts[position : position + 2] = ["".join(parts[position : position + 2])]
    tokens_of_text: list[int] = []
    for part in parts:
        tokens_of_text += [ids[part]] if part in ids else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return tokens_of_text


@pytest.fixture(scope="module")
def tinyllama(real_model: Callable[[str], Path]) -> tuple[TextTokenizer, dict[str, Any]]:
    fields = dict(_read_header(real_model("tinyllama-1.1b")).fields)
    return build_tokenizer(FILE, fields), fields


@pytest.fixture(scope="module")
def gemma(real_model: Callable[[str], Path]) -> tuple[TextTokenizer, dict[str, Any]]:
    fields = dict(_read_header(real_model("gemma-3-270m")).fields)
    return build_tokenizer(FILE, fields), fields


WORDS = st.sampled_from(["the", "Token", "ization", " ", "  ", "\n", "42", "x=", "é", "日本", "😀", "\t", ".", "aa"])


@given(text=st.lists(WORDS, max_size=12).map("".join) | st.text(max_size=30))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_llama2_ids_are_those_of_sentencepiece(tinyllama: tuple[TextTokenizer, dict[str, Any]], text: str) -> None:
    tokenizer, fields = tinyllama
    marked = f"▁{text}".replace(" ", "▁") if text else ""
    assert tokenizer.text.encode(text, add_special_tokens=False).ids == sentencepiece(marked, fields)


@pytest.mark.parametrize("text", TEXTS)
def test_llama2_ids_of_varied_text(tinyllama: tuple[TextTokenizer, dict[str, Any]], text: str) -> None:
    tokenizer, fields = tinyllama
    marked = f"▁{text}".replace(" ", "▁") if text else ""
    assert tokenizer.text.encode(text, add_special_tokens=False).ids == sentencepiece(marked, fields)


def test_known_llama2_ids(tinyllama: tuple[TextTokenizer, dict[str, Any]]) -> None:
    tokenizer, _ = tinyllama
    # https://huggingface.co/docs/transformers/model_doc/llama
    assert tokenizer.text.encode("Hello this is a test").ids == [15043, 445, 338, 263, 1243]
    assert (tokenizer.prefix, tokenizer.suffix) == ((1,), ())


@pytest.mark.parametrize("text", [text for text in TEXTS if "  " not in text and "\n\n" not in text])
def test_gemma_ids_of_varied_text(gemma: tuple[TextTokenizer, dict[str, Any]], text: str) -> None:
    tokenizer, fields = gemma
    parts = text.replace(" ", "▁").split("\t\t")  # a user-defined piece, cut out before any merge
    expected = sentencepiece(parts[0], fields)
    for part in parts[1:]:
        expected += [fields["tokenizer.ggml.tokens"].index("\t\t"), *sentencepiece(part, fields)]
    assert tokenizer.text.encode(text, add_special_tokens=False).ids == expected


def test_gemma_keeps_runs_whole(gemma: tuple[TextTokenizer, dict[str, Any]]) -> None:
    tokenizer, _ = gemma
    assert pieces_of(tokenizer, "a" + " " * 7 + "the") == ["a", "▁" * 7, "the"]
    assert pieces_of(tokenizer, " " * 40) == ["▁" * 31, "▁" * 9]
    assert pieces_of(tokenizer, "a\n\n\nb") == ["a", "\n\n\n", "b"]
    assert (tokenizer.prefix, tokenizer.bos_id, tokenizer.eos_id) == ((2,), 2, 1)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_ids_are_those_of_transformers(qwen2: tuple[TextTokenizer, Any], text: str) -> None:
    ours, theirs = qwen2
    expected = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert ours.text.encode(text, add_special_tokens=False).ids == expected
    assert (ours.prefix, ours.suffix) == ((), ())


@pytest.fixture(scope="module")
def qwen2(real_model: Callable[[str], Path]) -> tuple[TextTokenizer, Any]:
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    fields = _read_header(real_model("qwen2.5-coder-1.5b")).fields
    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges: Any = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    return build_tokenizer(FILE, fields), Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def test_smollm2_splits_numbers_into_digits(real_model: Callable[[str], Path]) -> None:
    tokenizer = build_tokenizer(FILE, _read_header(real_model("smollm2-135m")).fields)
    assert pieces_of(tokenizer, "In 2024, it's 3.14") == [
        *("In", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "Ġ", "3", ".", "1", "4")
    ]
    assert pieces_of(tokenizer, "<|im_start|>user") == ["<|im_start|>", "user"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix) == (1, 2, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "tokenizer None"),
        (spm_fields({"a": 0.0}, model="bert"), "tokenizer 'bert'.* gpt2, llama"),
        (byte_level_fields("viking"), "rule 'viking'; known are default, gpt-2"),
        (byte_level_fields("qwen2", tokens=np.zeros(3)), "no list of texts tokenizer.ggml.tokens"),
        (byte_level_fields("qwen2", merges=["ab"]), "no tokenizer can be made"),
        (byte_level_fields("qwen2", merges=["no token"]), "no tokenizer can be made"),
        (byte_level_fields("qwen2", token_type=np.ones(3, np.int32)), "token_type is not one number for each"),
        (spm_fields({"a": 0.0}, scores=np.zeros(3)), "scores is not one number for each"),
        (spm_fields({"a": 0.0}, bos_token_id=260), "bos_token_id is 260"),
        (spm_fields({"a": 0.0, "</s>": 0.0}), "has 1 tokens twice"),
    ],
)
def test_a_damaged_vocabulary_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        build_tokenizer(FILE, fields)
    assert str(FILE) in str(raised.value)
