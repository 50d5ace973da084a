"""Mine hard negatives: for each query, near texts that do not answer it.

The nearest text that is no known positive is often an unknown one. So a negative is taken only if it is less similar to
the query than the positive is, by a margin (positive-aware mining, NV-Retriever, arXiv 2407.15831). The search is
exact: GEMMs of blocks of queries and blocks of texts, without an index.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.disk import atomic_write
from unmask.encoder.unit_length import unit_length
from unmask.errors import UsageError
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.home import home
from unmask.training.mining_settings import MiningSettings
from unmask.training.rows import BadRows, read_rows

# Similarities of one block of queries with one block of texts: 32 MB.
_QUERIES, _TEXTS = 512, 16_384


@dataclass(frozen=True)
class MiningResult:
    """Counts of a mining run.

    Attributes:
        rows: pairs read.
        texts: different texts in the corpus.
        rows_by_negatives: number of rows by their number of negatives; rows_by_negatives[0] got none.
        refused: texts that only the limits kept from being negatives.
    """

    rows: int
    texts: int
    rows_by_negatives: tuple[int, ...]
    refused: int


ReportMining = Callable[[str, int, int], None]  # task, steps of it done just now, steps in all


def mine(
    mining: MiningSettings,
    model: EmbeddingModel,
    output: Path,
    report: ReportMining = lambda *_: None,
    cache: VectorCache | None = None,
) -> MiningResult:
    """Write `query`, `positive`, `negatives` for each row, as JSON lines in the rows' order.

    Vectors are cached as they are computed, so a run that was killed continues where it was. The same rows and the same
    vectors give the same file. Rows for which no negative is left are written with an empty list.

    Args:
        model: gives the vectors whose cosine similarity decides.
        output: written atomically.
        report: called for a progress bar.
        cache: stores vectors; default: the cache of `unmask evaluate`.

    Raises:
        UsageError: no such file or column, or nothing in it.
        StorageError: something cannot be read or written.
    """
    bad = BadRows(mining.max_bad_rows)
    pairs = list(_pairs(mining, bad))
    bad.close()
    if not pairs:
        raise UsageError(f"{mining.source} has no usable row; {bad.places[0] if bad.places else 'it is empty'}")
    corpus = list(dict.fromkeys(_texts(mining, bad) if mining.corpus else (positive for _, positive in pairs)))
    instruction = mining.instruction if model.takes_instructions else ""
    if cache is None:
        cache = VectorCache(home() / "vectors", model.revision, model.dimensions)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    documents = list(dict.fromkeys([*corpus, *(positive for _, positive in pairs)]))

    def vectors(texts: list[str], instruction: str, task: str) -> np.ndarray:
        rows = cache.encode(
            texts,
            instruction,
            lambda missing: model.encode(missing, instruction),
            progress=lambda done: report(task, done, len(texts)),
        )
        return unit_length(rows)

    query_vectors = vectors(queries, instruction, "queries")
    document_vectors = vectors(documents, instruction if mining.symmetric else "", "texts")
    query_row = {text: row for row, text in enumerate(queries)}
    document_row = {text: row for row, text in enumerate(documents)}
    never = _never(pairs, corpus)
    counts = [0] * (mining.count + 1)
    refused = 0
    with atomic_write(output) as partial, partial.open("w", encoding="utf-8") as file:
        for start in range(0, len(pairs), _QUERIES):
            part = pairs[start : start + _QUERIES]
            q = query_vectors[[query_row[query] for query, _ in part]]  # [b, W]
            p = document_vectors[[document_row[positive] for _, positive in part]]  # [b, W]
            limits = limits_of((q * p).sum(axis=1), mining.max_share, mining.margin)
            chosen, passed = nearest(
                q, document_vectors[: len(corpus)], limits, [never[_bare(query)] for query, _ in part], mining
            )
            refused += passed
            for (query, positive), rows in zip(part, chosen, strict=True):
                negatives = [corpus[row] for row in rows]
                counts[len(negatives)] += 1
                line = {"query": query, "positive": positive, "negatives": negatives}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            report("search", len(part), len(pairs))
    return MiningResult(len(pairs), len(corpus), tuple(counts), refused)


def limits_of(positive: np.ndarray, max_share: float | None, margin: float | None) -> np.ndarray:
    """Return the similarity that a negative must stay below, for each query.

    Args:
        positive: cosine of each query with its positive, [n].
        max_share: of it; a share of a negative cosine would lie above it, so the cosine itself is the limit then.
        margin: less than it.

    Returns:
        [n]; infinite where neither limit is set.
    """
    limits = np.full(len(positive), np.inf, dtype=np.float32)
    if max_share is not None:
        limits = np.minimum(limits, np.where(positive > 0, max_share * positive, positive))
    if margin is not None:
        limits = np.minimum(limits, positive - margin)
    return limits.astype(np.float32)


def nearest(
    queries: np.ndarray, texts: np.ndarray, limits: np.ndarray, never: Sequence[Sequence[int]], mining: MiningSettings
) -> tuple[list[list[int]], int]:
    """Find the nearest texts below each query's limit, nearest first, ties by their place in the corpus.

    Args:
        queries: [b, W], of length 1. texts: [C, W], of length 1.
        limits: [b].
        never: for each query, texts that must not be its negatives.
        mining: count and skip.

    Returns:
        At most `count` rows of `texts` for each query, and how many more there would be without the limits.
    """
    candidates = mining.skip + mining.count
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)  # [b, <= candidates]
    rows = np.zeros((len(queries), 0), dtype=np.int64)
    above = np.zeros(len(queries), dtype=np.int64)  # texts at or above the limit
    for start in range(0, len(texts), _TEXTS):
        block = texts[start : start + _TEXTS]
        scores = queries @ block.T  # [b, c]
        for index, places in enumerate(never):
            inside = [place - start for place in places if start <= place < start + len(block)]
            scores[index, inside] = -np.inf
        over = scores >= limits[:, None]
        above += over.sum(axis=1)
        scores[over] = -np.inf
        places = _highest(scores, min(candidates, len(block)))
        best = np.concatenate((best, np.take_along_axis(scores, places, axis=1)), axis=1)
        rows = np.concatenate((rows, places + start), axis=1)
        order = np.lexsort((rows, -best), axis=1)[:, :candidates]
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
    chosen: list[list[int]] = []
    refused = 0
    for index in range(len(queries)):
        # The nearest ones lie above the limit, so they are the first to be skipped.
        first = max(0, mining.skip - int(above[index]))
        usable = rows[index][np.isfinite(best[index])]
        chosen.append([int(row) for row in usable[first : first + mining.count]])
        refused += min(mining.count, max(0, int(above[index]) - mining.skip))
    return chosen, refused


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Find the places of the `count` highest in each row of [b, c], unordered. Ties at the edge: the first win."""
    places = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    edge = np.take_along_axis(scores, places, axis=1).min(axis=1, keepdims=True)
    cut = (scores >= edge).sum(axis=1) > count  # equals lie on both sides
    for row in np.flatnonzero(cut & np.isfinite(edge[:, 0])):
        places[row] = np.argsort(-scores[row], kind="stable")[:count]
    return places


def _never(pairs: Sequence[tuple[str, str]], corpus: Sequence[str]) -> dict[str, list[int]]:
    """Find the corpus places of each query and its positives, never negatives. Ignores case and spacing."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(corpus):
        places.setdefault(_bare(text), []).append(place)
    own: dict[str, dict[str, None]] = {}
    for query, positive in pairs:
        own.setdefault(_bare(query), {_bare(query): None})[_bare(positive)] = None
    return {query: sorted(place for text in texts for place in places.get(text, ())) for query, texts in own.items()}


def _bare(text: str) -> str:
    return " ".join(text.split()).casefold()


def _pairs(mining: MiningSettings, bad: BadRows) -> Iterator[tuple[str, str]]:
    columns = (mining.query, mining.positive)
    for row in read_rows(mining.source, bad, columns=columns):
        values = [_text_in(row.fields, column, mining.source) for column in columns]
        if all(values):
            bad.good()
            yield values[0], values[1]
        else:
            bad.report(row.place, f"no text in {columns[values.index('')]}")


def _texts(mining: MiningSettings, bad: BadRows) -> Iterator[str]:
    assert mining.corpus is not None
    for row in read_rows(mining.corpus, bad, columns=[mining.text], text_column=mining.text):
        text = _text_in(row.fields, mining.text, mining.corpus)
        if text:
            bad.good()
            yield text
        else:
            bad.report(row.place, f"no text in {mining.text}")


def _text_in(fields: dict, column: str, source: str) -> str:
    """Return the column's text, or the first of its list; empty if there is none."""
    if column not in fields:
        raise UsageError(f"{source} has no column {column!r}; it has {', '.join(fields)}")
    value = fields[column]
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and value.strip() else ""
