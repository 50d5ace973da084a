"""States of words: tokens of each word, their states, and storage so that nothing is computed twice."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unmask import Encoder
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.encoder.runtime.threads import parallel_map
from unmask.errors import StorageError, UsageError
from unmask.evaluate import word_states as module
from unmask.evaluate.word_states import WordTokens, tokenize_words, word_states

SENTENCES = [
    ["EU", "rejects", "German", "call", "to", "boycott", "British", "lamb", "."],
    ["Peter", "Blackburn"],
    ["Überraschung", "in", "東京", ":", "🇯🇵", "naïve", "e\u0301clair", "…"],
    ["antidisestablishmentarianism", "'s", "1996-08-30", "http://www.example.org/a?b=c"],
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(Path(__file__).parent.parent / "golden" / "tiny_llama")


def tokenized(encoder: Encoder, sentences: list[list[str]], max_length: int = 512) -> list[WordTokens]:
    return tokenize_words(encoder.checkpoint.tokenizer, sentences, max_length)


def test_words_have_their_own_tokens(encoder: Encoder) -> None:
    text = encoder.checkpoint.tokenizer.text
    several = 0
    for words, tokens in zip(SENTENCES, tokenized(encoder, SENTENCES), strict=True):
        assert tokens.ids[0] == encoder.checkpoint.tokenizer.bos_id
        assert tokens.with_state.tolist() == list(range(len(words)))
        assert int(tokens.counts.sum()) + 1 == len(tokens.ids)  # BOS, and every token belongs to one word
        for word, start, count in zip(words, tokens.starts, tokens.counts, strict=True):
            assert text.decode(tokens.ids[start : start + count].tolist()) == f" {word}"
            several += count > 1
    assert several > 10


def test_byte_level_words_read_as_with_add_prefix_space(encoder: Encoder) -> None:
    theirs = Tokenizer.from_str(encoder.checkpoint.tokenizer.text.to_str())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    for words, tokens in zip(SENTENCES, tokenized(encoder, SENTENCES), strict=True):
        assert tokens.ids[1:].tolist() == theirs.encode(words, is_pretokenized=True, add_special_tokens=False).ids


@pytest.mark.parametrize("prepended_by", ["normalizer", "metaspace"])
def test_sentencepiece_words_read_as_in_the_reference(prepended_by: str) -> None:
    """Llama 2's two spellings of a tokenizer: `▁` by the normalizer, or by the pre-tokenizer."""
    text = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepended_by == "normalizer":
        rules = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        text.normalizer = rules  # pyright: ignore[reportAttributeAccessIssue]
    else:
        text.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # pyright: ignore[reportAttributeAccessIssue]
    text.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    lines = [" ".join(words) for words in SENTENCES] * 3 + ["a a a call call to to"]
    text.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"]))  # pyright: ignore[reportCallIssue]
    tokenizer = TextTokenizer(text, bos_id=1, eos_id=None, prefix=(1,), suffix=())
    for words, tokens in zip(SENTENCES, tokenize_words(tokenizer, SENTENCES, 512), strict=True):
        reference = text.encode(words, is_pretokenized=True, add_special_tokens=False)  # is_split_into_words=True
        assert tokens.ids[1:].tolist() == reference.ids
        assert np.repeat(tokens.with_state, tokens.counts).tolist() == reference.word_ids
        assert all(reference.tokens[start - 1].startswith("▁") for start in tokens.starts)


def test_a_sequence_opens_with_bos_whatever_the_tokenizer_adds(encoder: Encoder) -> None:
    text = encoder.checkpoint.tokenizer.text
    for bos, eos, opening in ((5, 7, 5), (None, 7, 7)):
        [tokens] = tokenize_words(TextTokenizer(text, bos, eos, (), ()), [["a"]], 512)
        assert tokens.ids[0] == opening
    with pytest.raises(UsageError, match="BOS or EOS"):
        tokenize_words(TextTokenizer(text, None, None, (), ()), [["a"]], 512)
    with pytest.raises(UsageError, match="leaves no room"):
        tokenize_words(TextTokenizer(text, 5, 7, (5,), (7,)), [["a"]], 2)


@given(length=st.integers(2, 60))
@settings(max_examples=40)
def test_words_that_do_not_fit_are_cut_whole_and_counted(encoder: Encoder, length: int) -> None:
    for whole, tokens in zip(tokenized(encoder, SENTENCES), tokenized(encoder, SENTENCES, length), strict=True):
        assert len(tokens.ids) <= length
        assert tokens.ids.tolist() == whole.ids[: len(tokens.ids)].tolist()
        assert len(tokens.with_state) + tokens.truncated == len(whole.with_state)
        if tokens.truncated:  # the next word would not have fitted
            assert len(tokens.ids) + whole.counts[len(tokens.with_state)] > length


def test_words_without_tokens_are_counted(encoder: Encoder) -> None:
    text = Tokenizer.from_str(encoder.checkpoint.tokenizer.text.to_str())
    text.normalizer = normalizers.Strip()  # pyright: ignore[reportAttributeAccessIssue]
    [tokens] = tokenize_words(TextTokenizer(text, 1, 2, (1,), ()), [["a", "", "\t", "b"]], 512)
    assert (tokens.with_state.tolist(), tokens.blank, tokens.truncated) == ([0, 3], 2, 0)


word = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@torch.inference_mode()
def hidden_states(encoder: Encoder, sentence: WordTokens) -> np.ndarray:
    """Of one sentence alone, [length, W]."""
    return encoder.trainable_decoder()(torch.from_numpy(sentence.ids), [len(sentence.ids)]).numpy()


@given(sentences=st.lists(st.lists(word, min_size=1, max_size=8), min_size=1, max_size=6))
@settings(max_examples=25)
def test_states_are_means_over_the_words_own_tokens(encoder: Encoder, sentences: list[list[str]]) -> None:
    tokens = tokenized(encoder, sentences, 48)
    with tempfile.TemporaryDirectory() as folder:
        states = word_states(encoder, tokens, Path(folder), "tiny")
        same, following = (np.array(states[kind], dtype=np.float32) for kind in ("same_token", "next_token"))
    row = 0
    for sentence, hidden in zip(tokens, parallel_map(lambda s: hidden_states(encoder, s), tokens), strict=True):
        for start, count in zip(sentence.starts, sentence.counts, strict=True):
            own = hidden[start : start + count].mean(0)
            before = hidden[start - 1 : start + count - 1].mean(0)
            np.testing.assert_allclose(same[row], own, rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(following[row], before, rtol=2e-3, atol=2e-3)
            row += 1
    assert row == len(same) == len(following)


@pytest.mark.parametrize("kind", ["longer head", "shorter head", "cut vectors"])
def test_states_are_those_of_the_decoder_whatever_the_length_of_a_vector(
    encoder: Encoder, copied, tmp_path: Path, kind: str
) -> None:
    folder = copied("tiny_llama")
    settings: dict[str, object] = {"pooling_mode": "mean"}
    length = {"longer head": 96, "shorter head": 48, "cut vectors": 16}[kind]
    if kind == "cut vectors":
        settings["head"] = [{"kind": "truncate", "dimensions": length}]
    else:
        save_file({"weight": torch.ones(length, 64), "bias": torch.zeros(length)}, folder / "head.safetensors")
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    other = Encoder.load(folder)
    assert (other.dim, other.hidden_size) == (length, encoder.hidden_size)
    expected = word_states(encoder, tokenized(encoder, SENTENCES), tmp_path / "states", "bare")
    for name, states in word_states(other, tokenized(other, SENTENCES), tmp_path / "states", "other").items():
        np.testing.assert_array_equal(states, expected[name])
    for states in word_states(other, [], tmp_path / "states", "none").values():
        assert states.shape == (0, encoder.hidden_size)


class Counting(torch.nn.Module):
    """A decoder that counts its forwards and may die at one of them."""

    def __init__(self, inner: torch.nn.Module, dies_at: int | None = None) -> None:
        super().__init__()
        self.inner, self.dies_at, self.sequences = inner, dies_at, 0

    def forward(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        self.sequences += len(lengths)
        if self.dies_at is not None and self.sequences >= self.dies_at:
            raise KeyboardInterrupt
        return self.inner(ids, lengths)


@pytest.fixture
def counting(encoder: Encoder):
    """`counting(dies_at)` puts a fresh counting decoder into the encoder and returns it."""
    inner = encoder.trainable_decoder()

    def put(dies_at: int | None = None) -> Counting:
        decoder = Counting(inner, dies_at)
        encoder.replace_decoder(decoder)
        return decoder

    yield put
    encoder.replace_decoder(inner)


def test_states_are_computed_once(encoder: Encoder, counting, tmp_path: Path) -> None:
    tokens = tokenized(encoder, SENTENCES)
    settled: list[int] = []
    first = word_states(encoder, tokens, tmp_path, "r1", settled.append)
    decoder = counting()
    again = word_states(encoder, tokens, tmp_path, "r1", settled.append)
    assert decoder.sequences == 0
    assert settled == [len(SENTENCES)] * 2
    for kind, states in first.items():
        assert states.dtype == np.float16
        np.testing.assert_array_equal(again[kind], states)
    word_states(encoder, tokens, tmp_path, "r2")  # another revision, other states
    assert decoder.sequences == len(SENTENCES)
    word_states(encoder, tokenized(encoder, SENTENCES, 12), tmp_path, "r2")  # other tokens of the same sentences
    assert decoder.sequences == 2 * len(SENTENCES)


def test_a_killed_extraction_goes_on(
    encoder: Encoder, counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenized(encoder, SENTENCES * 6)
    whole = word_states(encoder, tokens, tmp_path / "whole", "r")
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 100)
    counting(dies_at=13)
    with pytest.raises(KeyboardInterrupt):
        word_states(encoder, tokens, tmp_path / "killed", "r")
    [file] = (tmp_path / "killed").rglob("same_token-*.f16")
    with file.open("ab") as torn:
        torn.write(b"half a row of a block that was never finished")
    decoder = counting()
    resumed = word_states(encoder, tokens, tmp_path / "killed", "r")
    assert 0 < decoder.sequences < len(tokens)
    for kind, states in whole.items():
        np.testing.assert_array_equal(resumed[kind], states)


@pytest.mark.parametrize("damage", ["record", "states"])
def test_damaged_files_are_computed_again(encoder: Encoder, tmp_path: Path, damage: str) -> None:
    tokens = tokenized(encoder, SENTENCES)
    before = {kind: np.array(states) for kind, states in word_states(encoder, tokens, tmp_path, "r").items()}
    [file] = tmp_path.rglob("done-*.json" if damage == "record" else "next_token-*.f16")
    file.write_bytes(file.read_bytes()[:7])
    for kind, states in word_states(encoder, tokens, tmp_path, "r").items():
        np.testing.assert_array_equal(states, before[kind])


def test_states_beyond_float16_are_held(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = encoder.trainable_decoder()

    class Loud(torch.nn.Module):
        def forward(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
            return inner(ids, lengths) * 1e9

    monkeypatch.setattr(type(encoder), "device", torch.device("cpu"))
    encoder.replace_decoder(Loud())
    try:
        states = word_states(encoder, tokenized(encoder, SENTENCES), tmp_path, "r")["same_token"]
    finally:
        encoder.replace_decoder(inner)
    assert np.isfinite(states).all()
    assert np.abs(states).max() == np.finfo(np.float16).max


def test_an_unwritable_cache_is_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep states of words"):
        word_states(encoder, tokenized(encoder, SENTENCES), tmp_path / "file", "r")
