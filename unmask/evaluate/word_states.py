"""Hidden states of words: sentences to tokens and back, and states kept on disk.

A sentence reads `opening, tokens of word 1, tokens of word 2, ...`. Two states are made of each word, both in one
forward (LLM2Vec, arXiv 2404.05961, appendix on word-level tasks):
    same_token  mean of the hidden states at the word's own tokens
    next_token  mean of the hidden states one position before each of them, where a model trained by MNTP or as a
                language model predicts these tokens
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from tokenizers import Tokenizer

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.disk import atomic_write
from unmask.encoder import Encoder
from unmask.encoder.packing import packs_of
from unmask.errors import StorageError, UsageError

States = Literal["same_token", "next_token"]
STATES: tuple[States, ...] = ("same_token", "next_token")

# float16 keeps 11 bits of a state: its rounding, 2^-11 of the value, is far below what a linear probe can tell.
# A state beyond its range is held at the end of it.
_STORED = np.dtype("<f2")
_LARGEST = float(np.finfo(_STORED).max)
# Tokens between two marks of progress on disk: what a killed extraction loses at most.
_BLOCK_TOKENS = 16_384


@dataclass(frozen=True)
class WordTokens:
    """One sentence as the model reads it.

    Attributes:
        ids: int64 [length], opening and closing tokens included.
        starts: position of the first token of each kept word, int64 [kept].
        counts: tokens of each kept word, all of them, int64 [kept].
        kept: which words have a state, int64 [kept], ascending.
        cut: words that did not fit the model's length. A word of which a part would fit is cut whole.
        blank: words of which the tokenizer made no token.
    """

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    kept: np.ndarray
    cut: int
    blank: int


def tokenize_words(tokenizer: TextTokenizer, sentences: Sequence[Sequence[str]], max_length: int) -> list[WordTokens]:
    """Tokens of sentences that are given as words, at most `max_length` each.

    Every word is tokenised as it would be after a space, the first one too. That is what the reference's
    `is_split_into_words=True` does for SentencePiece, whose tokenizers put "▁" before each word themselves, and for
    GPT-2's byte-level BPE with `add_prefix_space`. For other byte-level tokenizers (Llama 3, Qwen, SmolLM) the
    reference drops the spaces and reads "EUrejectsGerman"; here they get theirs.

    A sequence opens as the tokenizer says, with BOS as a rule. Where it puts nothing in front, BOS stands there all
    the same (EOS if there is no BOS): without it the first word has no position before it, and its own position is
    the one on which decoders park their attention, which says nothing about the word.

    Raises:
        UsageError: the model has neither BOS nor EOS, or `max_length` leaves no room for a word.
    """
    marker = next((token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None), None)
    opening = list(tokenizer.prefix) or ([] if marker is None else [marker])
    if not opening:
        raise UsageError("word-level evaluation needs a tokenizer with a BOS or EOS token; this model names neither")
    closing = list(tokenizer.suffix)
    room = max_length - len(opening) - len(closing)
    if room < 1:
        raise UsageError(f"max_length={max_length} leaves no room for words")
    space = _space_before(tokenizer.text)
    spelled = [[space + word for word in words] for words in sentences]
    encodings = tokenizer.text.encode_batch(spelled, is_pretokenized=True, add_special_tokens=False)
    aligned = []
    for words, encoding in zip(sentences, encodings, strict=True):
        counts = np.bincount(np.array(encoding.word_ids, dtype=np.int64), minlength=len(words))
        ends = np.cumsum(counts)
        fits = int(np.searchsorted(ends, room, side="right"))  # words that lie within the room
        kept = np.flatnonzero(counts[:fits])
        tokens = encoding.ids[: ends[fits - 1] if fits else 0]
        aligned.append(
            WordTokens(
                ids=np.array([*opening, *tokens, *closing], dtype=np.int64),
                starts=len(opening) + (ends - counts)[kept],
                counts=counts[kept],
                kept=kept,
                cut=int(np.count_nonzero(counts[fits:])),
                blank=int(np.count_nonzero(counts == 0)),
            )
        )
    return aligned


def word_states(
    encoder: Encoder,
    sentences: Sequence[WordTokens],
    cache: Path,
    revision: str,
    progress: Callable[[int], None] | None = None,
) -> dict[States, np.ndarray]:
    """Both states of every kept word, computed once and read from disk from then on.

    They lie in `cache/revision/words-<digest of the tokens and where words begin>/`. A killed extraction goes on
    where it was at most `_BLOCK_TOKENS` ago.

    Args:
        encoder: the model; its weights are not changed.
        sentences: from `tokenize_words`.
        cache: where all revisions are kept, for example `home() / "words"`.
        revision: content address of the model and all else that decides a state: precision, causal or not.
        progress: told the number of sentences that each step settled.

    Returns:
        For each kind of state float16 [words, W], memory-mapped, in the order of sentences and their kept words.

    Raises:
        StorageError: the folder cannot be written.
    """
    words = sum(len(sentence.kept) for sentence in sentences)
    if words == 0:
        return {kind: np.empty((0, encoder.dim), dtype=_STORED) for kind in STATES}
    store = _Store(cache / revision / f"words-{_digest(sentences)}", encoder.dim)
    with store.locked():
        reached = store.words()
        row = 0
        for block in _blocks(sentences):
            after = row + sum(len(sentence.kept) for sentence in block)
            if after > reached:
                store.append(row, _extract(encoder, block))
            row = after
            if progress is not None:
                progress(len(block))
    return store.read(words)


def _space_before(tokenizer: Tokenizer) -> str:
    """What to put before a word so that it is tokenised as after a space: nothing if the tokenizer does it itself."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    return "" if tokenizer.encode("a a", add_special_tokens=False).ids == alone * 2 else " "


def _digest(sentences: Sequence[WordTokens]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        for numbers in (sentence.ids, sentence.starts, sentence.counts):
            digest.update(len(numbers).to_bytes(8, "little") + numbers.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _blocks(sentences: Sequence[WordTokens]) -> list[list[WordTokens]]:
    """Neighbouring sentences of about `_BLOCK_TOKENS` in all."""
    blocks: list[list[WordTokens]] = []
    filled = _BLOCK_TOKENS
    for sentence in sentences:
        if filled + len(sentence.ids) > _BLOCK_TOKENS:
            blocks.append([])
            filled = 0
        blocks[-1].append(sentence)
        filled += len(sentence.ids)
    return blocks


def _extract(encoder: Encoder, sentences: Sequence[WordTokens]) -> dict[States, np.ndarray]:
    """Both states of every kept word, float32 [words, W], in order."""
    lengths = [len(sentence.ids) for sentence in sentences]
    packs = packs_of(lengths, encoder.device)
    ends = np.cumsum([len(sentence.kept) for sentence in sentences])
    states: dict[States, np.ndarray] = {kind: np.empty((ends[-1], encoder.dim), dtype=np.float32) for kind in STATES}
    results = encoder.map_packs(lambda members: _forward(encoder, [sentences[i] for i in members]), packs)
    for members, result in zip(packs, results, strict=True):
        start = 0
        for i in members:
            count = len(sentences[i].kept)
            for kind in STATES:
                states[kind][ends[i] - count : ends[i]] = result[kind][start : start + count]
            start += count
    return states


def _forward(encoder: Encoder, sentences: Sequence[WordTokens]) -> dict[States, np.ndarray]:
    """One forward over all sentences given; float32 [words, W] for each kind of state."""
    lengths = [len(sentence.ids) for sentence in sentences]
    hidden = encoder.states([sentence.ids for sentence in sentences]).float().cpu().numpy()  # [T, W]
    counts = np.concatenate([sentence.counts for sentence in sentences])  # [words]
    if len(counts) == 0:
        return {kind: np.empty((0, hidden.shape[1]), dtype=np.float32) for kind in STATES}
    offsets = np.cumsum([0, *lengths[:-1]])
    starts = np.concatenate([offset + s.starts for offset, s in zip(offsets, sentences, strict=True)])  # [words]
    first = np.cumsum(counts) - counts  # where each word begins among the words' tokens alone
    tokens = np.repeat(starts - first, counts) + np.arange(counts.sum())  # [tokens of words], positions in the pack
    each = counts[:, None].astype(np.float32)
    return {
        "same_token": np.add.reduceat(hidden[tokens], first) / each,
        "next_token": np.add.reduceat(hidden[tokens - 1], first) / each,
    }


class _Done(msgspec.Struct):
    words: int


class _Store:
    """States of one set of sentences: a file of rows per kind, and how many rows are whole."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width = folder, width
        self._files: dict[States, Path] = {kind: folder / f"{kind}-{width}.f16" for kind in STATES}
        self._done = folder / f"done-{width}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time extracts; the others find its states when they get in."""
        import fcntl

        with _storage(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    def words(self) -> int:
        """Rows that are whole in both files."""
        try:
            done = msgspec.json.decode(self._done.read_bytes(), type=_Done).words
            sizes = [file.stat().st_size for file in self._files.values()]
        except (FileNotFoundError, msgspec.MsgspecError):
            return 0
        return min(done, *(size // (self._width * _STORED.itemsize) for size in sizes))

    def append(self, row: int, states: dict[States, np.ndarray]) -> None:
        """Put states [n, W] from `row` on; whatever a killed process left there goes."""
        for kind, file in self._files.items():
            rows = np.clip(states[kind], -_LARGEST, _LARGEST).astype(_STORED)
            with file.open("r+b" if file.exists() else "w+b") as out:
                out.truncate(row * self._width * _STORED.itemsize)
                out.seek(0, os.SEEK_END)
                out.write(rows.tobytes())
                out.flush()
                os.fsync(out.fileno())
        with atomic_write(self._done) as partial:
            partial.write_bytes(msgspec.json.encode(_Done(row + len(states["same_token"]))))

    def read(self, words: int) -> dict[States, np.ndarray]:
        """The first `words` rows of each kind, memory-mapped."""
        with _storage(self._folder):
            return {
                kind: np.memmap(file, dtype=_STORED, mode="r", shape=(words, self._width))
                for kind, file in self._files.items()
            }


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep states of words in {folder}: {error.strerror or error}; "
            "free some space or set UNMASK_HOME elsewhere"
        ) from error
