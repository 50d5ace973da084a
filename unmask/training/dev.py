"""Evaluation during training: graded pairs, and examples held out of the training sets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.encoder.unit_length import unit_length
from unmask.errors import UsageError
from unmask.tables import Row, list_names
from unmask.training.examples import Examples
from unmask.training.recipe import Dev
from unmask.training.rows import BadRows, read_rows

HELD_OUT_COSINE = "held-out cosine"

Encode = Callable[[Sequence[str], str], np.ndarray]


@dataclass(frozen=True)
class GradedPairs:
    """Pairs of texts with the similarity that people gave them."""

    name: str
    first: list[str]
    second: list[str]
    gold: np.ndarray


class DevSets:
    """All sets that are evaluated during a run, read once.

    Attributes:
        graded: the sets of graded pairs.

    Args:
        dev: the graded sets.
        sets: the training sets with their held-out examples.
        root: the data folder.
        targets: maps texts to their target vectors, if the model learns the vectors of a teacher.
        seed: chooses the rows of a graded set with a limit.
        max_bad_rows: share of unreadable rows above which reading stops.
    """

    def __init__(
        self,
        dev: Sequence[Dev],
        sets: Sequence[Examples],
        root: Path | None,
        targets: Callable[[Sequence[str]], np.ndarray] | None = None,
        *,
        seed: int = 0,
        max_bad_rows: float = 0.01,
    ) -> None:
        self._targets = targets
        self._held_out_texts = {
            examples.source.name: list(dict.fromkeys(text for e in examples.held_out for text in e.texts()[:2]))
            for examples in sets
            if examples.source.use_teacher and examples.held_out and targets is not None
        }
        self.graded = [_read_graded(each, root, seed, max_bad_rows) for each in dev]
        self._pairs: dict[str, tuple[list[str], list[str], str, bool]] = {}
        for examples in sets:
            source = examples.source
            if not examples.held_out or not source.use_labels:
                continue
            by_label = {example.label: example.query for example in examples.train if example.label is not None}
            pairs = {
                # One text per label, or the right answer would not be alone.
                number if example.label is None else example.label: (example.query, positive)
                for number, example in enumerate(examples.held_out)
                if (positive := example.positive or by_label.get(example.label or "")) is not None
            }.values()
            if not pairs:  # texts without positives
                continue
            self._pairs[source.name] = (
                [q for q, _ in pairs],
                [p for _, p in pairs],
                source.instruction,
                source.symmetric,
            )

    def __len__(self) -> int:
        return len(self.graded) + len(self._pairs) + bool(self._held_out_texts)

    def scores(self, encode: Encode) -> dict[str, float]:
        """Score every set, 0-100.

        Graded pairs: the Spearman correlation. Held-out pairs: the share of queries whose own positive is the nearest.
        Held-out texts with a teacher: the mean cosine to their targets.

        Args:
            encode: maps texts and an instruction to unit vectors [n, W].
        """
        scores: dict[str, float] = {}
        for pairs in self.graded:
            vectors = encode(pairs.first + pairs.second, "")
            cosines = (vectors[: len(pairs.first)] * vectors[len(pairs.first) :]).sum(axis=1)
            scores[pairs.name] = 100 * spearman(cosines, pairs.gold)
        for name, (queries, positives, instruction, symmetric) in self._pairs.items():
            q = encode(queries, instruction)
            p = encode(positives, instruction if symmetric else "")
            # Two queries may share a positive, as questions about one passage do. Either copy counts as correct.
            hits = [positives[nearest] == own for nearest, own in zip((q @ p.T).argmax(axis=1), positives, strict=True)]
            scores[name] = 100 * float(np.mean(hits))
        if self._held_out_texts and self._targets is not None:
            texts = [text for held_out in self._held_out_texts.values() for text in held_out]
            vectors = encode(texts, "")
            targets = _first_numbers_of(self._targets(texts), vectors.shape[1])
            scores[HELD_OUT_COSINE] = 100 * float((vectors * targets).sum(axis=1).mean())
        return scores


def _first_numbers_of(targets: np.ndarray, length: int) -> np.ndarray:
    """Cut unit vectors to their first numbers and scale them to length 1: the loss of vectors compares these."""
    if targets.shape[1] == length:
        return targets
    return unit_length(targets[:, :length])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation. Ties get their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _read_graded(dev: Dev, root: Path | None, seed: int, max_bad_rows: float) -> GradedPairs:
    bad = BadRows(max_bad_rows)
    columns = (dev.first, dev.second, dev.score)
    rows: list[tuple[str, str, float]] = []
    for row in read_rows(dev.path, bad, root, columns):
        missing = next((column for column in columns if column not in row.fields), None)
        if missing is not None:
            raise UsageError(
                f"dev {dev.name!r}: {row.place} has no column {missing!r}; it has {list_names(list(row.fields))}"
            )
        try:
            rows.append((_text(row, dev.first), _text(row, dev.second), _score(row, dev.score)))
        except ValueError as error:
            bad.report(row.place, str(error))
        else:
            bad.good()
    bad.close()
    if not rows:
        raise UsageError(f"dev {dev.name!r}: {dev.path} holds no rows")
    if len({score for _, _, score in rows}) == 1:
        raise UsageError(
            f"dev {dev.name!r}: all scores in {dev.path} are {rows[0][2]:g}, so there is no rank to compare"
        )
    if dev.limit is not None and dev.limit < len(rows):
        chosen = np.random.default_rng([seed, *dev.name.encode()]).permutation(len(rows))[: dev.limit]
        rows = [rows[i] for i in sorted(chosen)]
    first, second, gold = (list(column) for column in zip(*rows, strict=True))
    return GradedPairs(dev.name, first, second, np.array(gold))


def _text(row: Row, column: str) -> str:
    text = row.text(column)
    if not text.strip():
        raise ValueError(f"field {column!r} is empty")
    return text


def _score(row: Row, column: str) -> float:
    value = row.fields[column]
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"field {column!r}: {str(value)[:40]!r} is no finite number")
    return score
