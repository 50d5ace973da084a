"""Read rows into examples: choose columns, count bad rows, drop evaluation texts, draw the sample by the seed."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unmask.errors import UsageError
from unmask.training.decontamination import Decontaminator
from unmask.training.recipe import DataSource
from unmask.training.rows import BadRows, Row, read_rows

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
# A shorter piece is a brace of code or a heading of a word or two.
_WORDS_OF_A_PIECE = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a text, a text with a label, or a query with a positive and hard negatives."""

    query: str
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    label: str | None = None

    def texts(self) -> tuple[str, ...]:
        """Return every text of the example."""
        return (self.query, *((self.positive,) if self.positive is not None else ()), *self.negatives)


@dataclass
class Examples:
    """One data set, in memory.

    Attributes:
        source: its entry in the recipe.
        train: examples to learn from.
        held_out: examples that are not trained on.
        bad: rows that could not be used.
        overlapping: number of rows dropped because they overlap with evaluation data.
    """

    source: DataSource
    train: list[Example]
    held_out: list[Example]
    bad: BadRows
    overlapping: int

    def counts(self) -> dict[str, int]:
        """Return the numbers of examples and of rows left out, by their names."""
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "overlapping": self.overlapping,
            "unusable": self.bad.bad,
        }

    def digest(self) -> str:
        """Hash of the training examples, 16 hex digits."""
        digest = hashlib.sha256()
        for example in self.train:
            for part in (*example.texts(), example.label or ""):
                digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]


def load_examples(
    source: DataSource, root: Path | None, decontaminator: Decontaminator | None, seed: int, max_bad_rows: float
) -> Examples:
    """Read one data set into memory. The same source and seed give the same examples in the same order.

    Raises:
        UsageError: no such file or column, too many bad rows, or nothing left to train on.
        StorageError: the file cannot be read.
    """
    bad = BadRows(max_bad_rows)
    examples: list[Example] = []
    overlapping = 0
    for example in read_examples(source, root, bad):
        if decontaminator is not None and any(decontaminator.overlaps(text) for text in example.texts()):
            overlapping += 1
        else:
            examples.append(example)
    bad.close()
    if not examples:
        raise UsageError(
            f"data {source.name!r}: no usable row in {source.path} ({bad.seen} seen, "
            f"{overlapping} overlap with evaluation data)"
        )
    # The order depends on the data set's own name, so that adding another one changes nothing here.
    order = np.random.default_rng([seed, *source.name.encode()]).permutation(len(examples))
    chosen = [examples[i] for i in order]
    held_out, rest = chosen[: source.held_out], chosen[source.held_out :]
    if source.share is not None:
        rest = rest[: max(1, round(source.share * len(rest)))]
    train = rest[: source.limit] if source.limit else rest
    if not train:
        raise UsageError(f"data {source.name!r}: all {len(examples)} rows are held out; lower held_out")
    return Examples(source, train, held_out, bad, overlapping)


def read_examples(source: DataSource, root: Path | None, bad: BadRows) -> Iterator[Example]:
    """Yield the examples of one data set in the order of its rows, without sampling or decontamination."""
    columns = source.columns()
    for number, row in enumerate(read_rows(source.path, bad, root, columns, source.text or "text")):
        if number == 0:
            _require_columns(source, row)
        if source.rows != "all" and number % 2 != (source.rows == "odd"):
            continue
        if any(str(row.fields.get(column)) not in values for column, values in source.only.items()):
            continue
        if any(str(row.fields.get(column)) in values for column, values in source.without.items()):
            continue
        try:
            examples = _examples(source, row)
        except ValueError as error:
            bad.report(row.place, str(error))
            continue
        bad.good()
        yield from examples


def _require_columns(source: DataSource, row: Row) -> None:
    for column in source.columns():
        if column not in row.fields:
            raise UsageError(
                f"data {source.name!r}: {row.place} has no column {column!r}; it has {', '.join(row.fields)}"
            )


def _examples(source: DataSource, row: Row) -> list[Example]:
    if source.piece_characters is None:
        return [_example(source, row)]
    assert source.text is not None  # DataSource requires it
    text = _text(row, source.text)
    if not text.strip():
        raise ValueError(f"field {source.text!r} is empty")
    return [Example(_cut(piece, source)) for piece in pieces(text, source.piece_characters)]


def pieces(text: str, characters: int) -> list[str]:
    """Split a text into pieces of whole sentences, each of at most `characters` characters.

    A piece ends with its line: headings, list items and code keep apart. A sentence that is longer than a piece is cut
    at its last space within the piece, and the rest is dropped. Pieces of fewer than three words are left out.
    """
    parts: list[str] = []
    for line in text.splitlines():
        piece = ""
        for sentence in filter(None, _SENTENCE_END.split(line.strip())):
            longer = f"{piece} {sentence}" if piece else sentence
            if piece and len(longer) > characters:
                parts.append(piece)
                longer = sentence
            piece = _shorten(longer, characters)
        if piece:
            parts.append(piece)
    return [piece for piece in parts if len(piece.split()) >= _WORDS_OF_A_PIECE]


def _example(source: DataSource, row: Row) -> Example:
    if source.text is not None:
        label = row.fields.get(source.label) if source.label else None
        if source.label and label in (None, ""):
            raise ValueError(f"no {source.label}")
        return Example(_filled(row, source.text, source), label=None if label is None else str(label))
    assert source.query is not None and source.positive is not None  # Source requires it
    negatives: list[str] = []
    for column in source.negatives:
        value = row.fields.get(column)
        texts = value if isinstance(value, list) else [value]
        texts = [replace(row, fields={column: text}).text(column) for text in texts]
        negatives += [_cut(text, source) for text in texts if text.strip()]
    return Example(_filled(row, source.query, source), _filled(row, source.positive, source), tuple(negatives))


def _filled(row: Row, column: str, source: DataSource) -> str:
    text = _text(row, column)
    if not text.strip():
        raise ValueError(f"field {column!r} is empty")
    return _cut(text, source)


def _text(row: Row, column: str) -> str:
    """Return the text of a column, or the first text of a list; "" for null."""
    value = row.fields.get(column)
    if isinstance(value, list) and value and isinstance(value[0], str):
        row = replace(row, fields={column: value[0]})
    return row.text(column)


def _cut(text: str, source: DataSource) -> str:
    """Cut a text to the source's `max_characters` at the end of a word. A longer word is cut within."""
    if source.max_characters is None:
        return text
    return _shorten(text.lstrip(), source.max_characters)


def _shorten(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return (text[: characters + 1].rpartition(" ")[0] or text[:characters]).rstrip()
