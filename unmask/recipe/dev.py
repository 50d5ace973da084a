"""How good the model is while it trains: graded pairs, and pairs held out of the training sets."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unmask.errors import UsageError
from unmask.recipe.examples import Examples
from unmask.recipe.recipe import Dev, Recipe
from unmask.recipe.rows import BadRows, read_rows

Encode = Callable[[Sequence[str], str], np.ndarray]


class DevSets:
    """Everything that is watched, read once.

    Args:
        recipe: names the graded sets.
        sets: the training sets with their held-out examples.
        root: the data folder.
    """

    def __init__(self, recipe: Recipe, sets: list[Examples], root: Path | None) -> None:
        self._graded = {dev.name: _read_graded(dev, root, recipe.seed, recipe.max_bad_rows) for dev in recipe.dev}
        self._pairs: dict[str, tuple[list[str], list[str], str, bool]] = {}
        for examples in sets:
            source = examples.source
            if not examples.held_out or not source.contrast:
                continue
            by_label = {example.label: example.query for example in examples.train if example.label is not None}
            pairs = {
                # One text per label, or the right answer would not be alone.
                number if example.label is None else example.label: (example.query, positive)
                for number, example in enumerate(examples.held_out)
                if (positive := example.positive or by_label.get(example.label or "")) is not None
            }.values()
            if not pairs:  # texts alone: nothing to find
                continue
            self._pairs[source.name] = (
                [q for q, _ in pairs],
                [p for _, p in pairs],
                source.instruction,
                source.symmetric,
            )

    def __len__(self) -> int:
        return len(self._graded) + len(self._pairs)

    def scores(self, encode: Encode) -> dict[str, float]:
        """0-100 per set: Spearman correlation for graded pairs, and for held-out pairs the share of queries whose own
        positive is the nearest of all.

        Args:
            encode: of texts and an instruction, unit vectors [n, W].
        """
        found: dict[str, float] = {}
        for name, (first, second, gold) in self._graded.items():
            vectors = encode(first + second, "")
            cosines = (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)
            found[name] = 100 * spearman(cosines, gold)
        for name, (queries, positives, instruction, symmetric) in self._pairs.items():
            q = encode(queries, instruction)
            p = encode(positives, instruction if symmetric else "")
            # Two queries may share a positive, as questions about one passage do; either of its copies is right.
            right = [
                positives[nearest] == own for nearest, own in zip((q @ p.T).argmax(axis=1), positives, strict=True)
            ]
            found[name] = 100 * float(np.mean(right))
        return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _read_graded(
    dev: Dev, root: Path | None, seed: int, max_bad_rows: float
) -> tuple[list[str], list[str], np.ndarray]:
    bad = BadRows(max_bad_rows)
    rows = []
    for row in read_rows(dev.path, bad, root):
        bad.good()
        rows.append(row.fields)
    bad.close()
    if not rows:
        raise UsageError(f"dev {dev.name!r}: {dev.path} holds no rows")
    if dev.limit is not None and dev.limit < len(rows):
        chosen = np.random.default_rng([seed, *dev.name.encode()]).permutation(len(rows))[: dev.limit]
        rows = [rows[i] for i in sorted(chosen)]
    try:
        first, second = ([str(row[column]) for row in rows] for column in (dev.first, dev.second))
        gold = np.array([float(row[dev.score]) for row in rows])
    except KeyError as error:
        raise UsageError(
            f"dev {dev.name!r}: {dev.path} has no column {error.args[0]!r}; it has {', '.join(rows[0])}"
        ) from error
    except ValueError as error:
        raise UsageError(f"dev {dev.name!r}: a score in {dev.path} is no number ({error})") from error
    return first, second, gold
