"""Hidden states of words: tokens of words, their states from one forward, and states stored on disk.

A sentence reads `opening, tokens of word 1, tokens of word 2, ...`. Each word has two states, both from one
forward (LLM2Vec, arXiv 2404.05961, appendix on word-level tasks):
    same_token  mean of the hidden states at the word's own tokens
    next_token  mean of the hidden states one position before each of them, where a model trained by MNTP or as a
                language model predicts these tokens
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from tokenizers import Tokenizer

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.disk import HOME_IS_FULL, atomic_write, locked, storage_errors
from unmask.encoder import Encoder
from unmask.encoder.packing import packs_of
from unmask.errors import UsageError

States = Literal["same_token", "next_token"]
STATES: tuple[States, ...] = ("same_token", "next_token")

# float16 keeps 11 bits of a state: its rounding, 2^-11 of the value, is far below the resolution of a linear probe.
# States beyond its range are clipped.
_STORED = np.dtype("<f2")
_LARGEST = float(np.finfo(_STORED).max)
# Tokens between two checkpoints on disk: a killed extraction loses this many at most.
_BLOCK_TOKENS = 16_384


@dataclass(frozen=True)
class WordTokens:
    """The tokens of one sentence.

    Attributes:
        ids: int64 [length], opening and closing tokens included.
        with_state: indices of the words that have a state, int64 [n], ascending.
        starts: position of the first token of each of these words, int64 [n].
        counts: number of tokens of each of these words, int64 [n].
        truncated: number of words beyond the model's length. A word of which only a part fits is left out whole.
        blank: number of words for which the tokenizer gives no token.
    """

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    with_state: np.ndarray
    truncated: int
    blank: int


def tokenize_words(tokenizer: TextTokenizer, sentences: Sequence[Sequence[str]], max_length: int) -> list[WordTokens]:
    """Tokenise sentences that are lists of words, to at most `max_length` tokens each.

    Every word is tokenised as it would be after a space, the first one too. That is what the reference's
    `is_split_into_words=True` does for SentencePiece, whose tokenizers put "▁" before each word themselves, and for
    GPT-2's byte-level BPE with `add_prefix_space`. For other byte-level tokenizers (Llama 3, Qwen, SmolLM) the
    reference drops the spaces and reads "EUrejectsGerman"; here they get theirs.

    A sequence opens with the tokenizer's own prefix, usually BOS. If the tokenizer adds none, BOS is added here (EOS if
    there is no BOS). Without it the first word has no position before it, and its own position is the attention sink
    of the decoder, whose state does not represent the word.

    Raises:
        UsageError: the model has neither BOS nor EOS, or `max_length` leaves no space for a word.
    """
    marker = next((token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None), None)
    opening = list(tokenizer.prefix) or ([] if marker is None else [marker])
    if not opening:
        raise UsageError("word-level evaluation needs a tokenizer with a BOS or EOS token; this model names neither")
    closing = list(tokenizer.suffix)
    capacity = max_length - len(opening) - len(closing)
    if capacity < 1:
        raise UsageError(f"max_length={max_length} leaves no room for words")
    space = _space_before(tokenizer.text)
    spaced_words = [[space + word for word in words] for words in sentences]
    encodings = tokenizer.plain.encode_batch(spaced_words, is_pretokenized=True, add_special_tokens=False)
    sentence_tokens = []
    for words, encoding in zip(sentences, encodings, strict=True):
        counts = np.bincount(np.array(encoding.word_ids, dtype=np.int64), minlength=len(words))
        ends = np.cumsum(counts)
        fits = int(np.searchsorted(ends, capacity, side="right"))  # words that fit
        with_state = np.flatnonzero(counts[:fits])
        tokens = encoding.ids[: ends[fits - 1] if fits else 0]
        sentence_tokens.append(
            WordTokens(
                ids=np.array([*opening, *tokens, *closing], dtype=np.int64),
                starts=len(opening) + (ends - counts)[with_state],
                counts=counts[with_state],
                with_state=with_state,
                truncated=int(np.count_nonzero(counts[fits:])),
                blank=int(np.count_nonzero(counts == 0)),
            )
        )
    return sentence_tokens


def word_states(
    encoder: Encoder,
    sentences: Sequence[WordTokens],
    cache: Path,
    revision: str,
    progress: Callable[[int], None] | None = None,
) -> dict[States, np.ndarray]:
    """Return both states of every word of `with_state`; compute them once and read them from disk afterwards.

    The folder is `cache/revision/words-<digest of the tokens and the starts of words>/`. A killed extraction resumes at
    most `_BLOCK_TOKENS` before the point that it had reached.

    Args:
        encoder: the model; its weights are not changed.
        sentences: from `tokenize_words`.
        cache: parent folder of all revisions, for example `home() / "words"`.
        revision: content address of everything that decides a state: weights, precision, causal mask.
        progress: called with the number of sentences that each step finished.

    Returns:
        For each kind of state float16 [words, W], memory-mapped, in the order of sentences and of `with_state`.

    Raises:
        StorageError: the folder cannot be written.
    """
    words = sum(len(sentence.with_state) for sentence in sentences)
    if words == 0:
        return {kind: np.empty((0, encoder.hidden_size), dtype=_STORED) for kind in STATES}
    store = _Store(cache / revision / f"words-{_digest(sentences)}", encoder.hidden_size)
    with store.locked():
        reached = store.words()
        row = 0
        for block in _blocks(sentences):
            after = row + sum(len(sentence.with_state) for sentence in block)
            if after > reached:
                store.append(row, _extract(encoder, block))
            row = after
            if progress is not None:
                progress(len(block))
    return store.read(words)


def _space_before(tokenizer: Tokenizer) -> str:
    """Return the prefix with which a word is tokenised as after a space: "" if the tokenizer adds the space itself."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    return "" if tokenizer.encode("a a", add_special_tokens=False).ids == alone * 2 else " "


def _digest(sentences: Sequence[WordTokens]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        for numbers in (sentence.ids, sentence.starts, sentence.counts):
            digest.update(len(numbers).to_bytes(8, "little") + numbers.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _blocks(sentences: Sequence[WordTokens]) -> list[list[WordTokens]]:
    """Return runs of neighbouring sentences with about `_BLOCK_TOKENS` tokens each."""
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
    """Return both states of every word of `with_state`, float32 [words, W], in order."""
    lengths = [len(sentence.ids) for sentence in sentences]
    packs = packs_of(lengths, encoder.device)
    ends = np.cumsum([len(sentence.with_state) for sentence in sentences])
    shape = int(ends[-1]), encoder.hidden_size
    states: dict[States, np.ndarray] = {kind: np.empty(shape, dtype=np.float32) for kind in STATES}
    results = encoder.map_packs(lambda members: _forward(encoder, [sentences[i] for i in members]), packs)
    for members, result in zip(packs, results, strict=True):
        start = 0
        for i in members:
            count = len(sentences[i].with_state)
            for kind in STATES:
                states[kind][ends[i] - count : ends[i]] = result[kind][start : start + count]
            start += count
    return states


def _forward(encoder: Encoder, sentences: Sequence[WordTokens]) -> dict[States, np.ndarray]:
    """Run one forward over all sentences; return float32 [words, W] for each kind of state."""
    lengths = [len(sentence.ids) for sentence in sentences]
    hidden = encoder.states([sentence.ids for sentence in sentences]).float().cpu().numpy()  # [T, W]
    counts = np.concatenate([sentence.counts for sentence in sentences])  # [words]
    if len(counts) == 0:
        return {kind: np.empty((0, hidden.shape[1]), dtype=np.float32) for kind in STATES}
    offsets = np.cumsum([0, *lengths[:-1]])
    starts = np.concatenate([offset + s.starts for offset, s in zip(offsets, sentences, strict=True)])  # [words]
    first = np.cumsum(counts) - counts  # index of each word's first token among the tokens of words alone
    tokens = np.repeat(starts - first, counts) + np.arange(counts.sum())  # [tokens of words], positions in the pack
    each = counts[:, None].astype(np.float32)
    return {
        "same_token": np.add.reduceat(hidden[tokens], first) / each,
        "next_token": np.add.reduceat(hidden[tokens - 1], first) / each,
    }


class _Checkpoint(msgspec.Struct):
    words: int


class _Store:
    """Files with the states of one set of sentences: one file of rows per kind, and the number of complete rows."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width = folder, width
        self._files: dict[States, Path] = {kind: folder / f"{kind}-{width}.f16" for kind in STATES}
        self._checkpoint_file = folder / f"done-{width}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder: one process extracts, the others wait and then read its states."""
        with self._storage_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            with locked(self._folder / "lock"):
                yield

    def words(self) -> int:
        """Count the rows that are complete in both files."""
        try:
            done = msgspec.json.decode(self._checkpoint_file.read_bytes(), type=_Checkpoint).words
            sizes = [file.stat().st_size for file in self._files.values()]
        except (FileNotFoundError, msgspec.MsgspecError):
            return 0
        return min(done, *(size // (self._width * _STORED.itemsize) for size in sizes))

    def append(self, row: int, states: dict[States, np.ndarray]) -> None:
        """Write states [n, W] from `row` on, over anything that a killed process left there."""
        for kind, file in self._files.items():
            rows = np.clip(states[kind], -_LARGEST, _LARGEST).astype(_STORED)
            with file.open("r+b" if file.exists() else "w+b") as out:
                out.truncate(row * self._width * _STORED.itemsize)
                out.seek(0, os.SEEK_END)
                out.write(rows.tobytes())
                out.flush()
                os.fsync(out.fileno())
        with atomic_write(self._checkpoint_file) as partial:
            partial.write_bytes(msgspec.json.encode(_Checkpoint(row + len(states["same_token"]))))

    def read(self, words: int) -> dict[States, np.ndarray]:
        """Return the first `words` rows of each kind, memory-mapped."""
        with self._storage_errors():
            return {
                kind: np.memmap(file, dtype=_STORED, mode="r", shape=(words, self._width))
                for kind, file in self._files.items()
            }

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"states of words in {self._folder}", HOME_IS_FULL, action="keep")
