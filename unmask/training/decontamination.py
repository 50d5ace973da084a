"""Decontamination: keep evaluation texts out of the training data.

A training text is dropped if it is an evaluation text, or shares ten words in a row with one. Texts are compared as
lowercase words without accents and punctuation, so that case and tokenisation marks do not hide a copy. In a script
without spaces between words, every character is a word.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unmask.disk import files_below
from unmask.training.rows import FORMATS, BadRows, read_rows

_WORDS = re.compile(r"[^\W_]+")
# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Hiragana and Katakana, Han.
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    "\u3041-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af"
)
_WORDS_OR_CHARACTERS = re.compile(rf"[^\W_{_NO_SPACES}]+|(?=[^\W_])[{_NO_SPACES}]")
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc`\u00b4]")
# The Penn treebank cuts "don't" into "do n't" and "it's" into "it 's".
_CUT = re.compile(r"\s+(?=n't\b|'(?:s|m|d|t|re|ve|ll)\b)")
_ENDINGS = tuple(f".{kind}" for kind in FORMATS)
# Bracket marks of the Penn treebank, which some corpora carry as words.
_MARKS = frozenset(("lrb", "rrb", "lsb", "rsb", "lcb", "rcb"))


def words_of(text: str) -> list[str]:
    """Split a text into lowercase words without punctuation; a character of a script without spaces is a word.

    >>> words_of("The AFC -LRB- American -RRB- champion 's 24-10 win: Beyonc\u00e9 did n\u2019t sing.")
    ['the', 'afc', 'american', 'champions', '24', '10', 'win', 'beyonce', 'didnt', 'sing']
    >>> words_of("\u6211\u7528 Python 3\u3002")
    ['\u6211', '\u7528', 'python', '3']
    """
    if not text.isascii():
        text = _APOSTROPHES.sub("'", text)
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = _CUT.sub("", text.lower()).replace("'", "")
    pattern = _WORDS if text.isascii() else _WORDS_OR_CHARACTERS
    return [word for word in pattern.findall(text) if word not in _MARKS]


class Decontaminator:
    """Finds training texts that overlap with evaluation texts.

    Args:
        texts: the evaluation texts.
        run: number of consecutive words that two texts may not share. Shorter evaluation texts are compared as a whole.
    """

    def __init__(self, texts: Iterable[str], run: int = 10) -> None:
        self._run = run
        hashes: set[int] = set()
        for text in texts:
            hashes.update(self._hashes_of(words_of(text)))
        self._hashes = np.array(sorted(hashes), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._hashes)

    def overlaps(self, text: str) -> bool:
        """Return True if the text is an evaluation text or shares a run of words with one."""
        hashes = np.fromiter(self._hashes_of(words_of(text)), dtype=np.uint64)
        if not len(hashes) or not len(self._hashes):
            return False
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return bool((self._hashes[places] == hashes).any())

    def _hashes_of(self, words: list[str]) -> Iterator[int]:
        """Yield a 64-bit hash of every run of words; of the whole text if it is shorter than a run."""
        if len(words) < 3:
            return  # "yes" and "thank you" are in every corpus
        for start in range(max(1, len(words) - self._run + 1)):
            part = " ".join(words[start : start + self._run])
            yield int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")


def read_decontaminator(folder: Path, run: int = 10) -> Decontaminator:
    """Read every text field of every data file below a folder (tsv, csv, jsonl, parquet, txt; gzipped or not).

    Raises:
        UsageError: as `files_below`.
    """

    def texts() -> Iterator[str]:
        for file in files_below(folder):
            if not file.name.removesuffix(".gz").endswith(_ENDINGS):
                continue
            for row in read_rows(str(file), BadRows(allowed_share=1.0)):
                for value in row.fields.values():
                    yield from _texts_of_field(value)

    return Decontaminator(texts(), run)


def _texts_of_field(value: Any) -> Iterator[str]:
    """Yield a text, or each text of a list and all of them joined, since a list may be a sentence kept as its words."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if any(isinstance(each, str) for each in value):
            yield " ".join(map(str, value))
        for each in value:
            yield from _texts_of_field(each)
