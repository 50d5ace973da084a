"""Recall of quantised vectors: python benchmarks/quantised_recall.py FILE.tsv COLUMN

Takes the 1,200 different texts of a column with the smallest hashes, the last 200 of them as queries. Prints the share
of the ten nearest by float vectors that are among the ten nearest by quantised ones, by cosine or Hamming distance;
and the same where the forty nearest by signs are ranked again by float vectors.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from unmask import Encoder
from unmask.api.quantisation import quantise_vectors
from unmask.encoder.unit_length import unit_length
from unmask.tables import read_table

TEXTS, QUERIES, NEAREST, CANDIDATES = 1200, 200, 10, 40


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def nearest(scores: np.ndarray, count: int = NEAREST) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def recall(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / NEAREST for a, b in zip(expected, actual, strict=True)]))


def cosine(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    queries, documents = map(unit_length, (queries, documents))
    return queries @ documents.T


def main(file: str, column: str) -> None:
    texts = sorted({str(row.fields[column]) for row in read_table(Path(file))}, key=_digest)[:TEXTS]
    vectors = Encoder.load("unmask/smollm2-135m-embed").encode(texts, normalize=True)
    documents, queries = vectors[:-QUERIES], vectors[-QUERIES:]
    exact = cosine(queries, documents)
    expected = nearest(exact)
    eight_bits = quantise_vectors(vectors, "int8").astype(np.float32)
    print(f"{len(documents)} texts, {len(queries)} queries, {vectors.shape[1]} dimensions")
    print(f"int8     {recall(expected, nearest(cosine(eight_bits[-QUERIES:], eight_bits[:-QUERIES]))):.3f}")
    signs = np.unpackbits(quantise_vectors(vectors, "ubinary"), axis=1).astype(np.float32) * 2 - 1
    agreement = signs[-QUERIES:] @ signs[:-QUERIES].T
    print(f"binary   {recall(expected, nearest(agreement)):.3f}")
    candidates = nearest(agreement, CANDIDATES)
    order = nearest(np.take_along_axis(exact, candidates, axis=1))
    print(f"binary, {CANDIDATES} ranked again {recall(expected, np.take_along_axis(candidates, order, axis=1)):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
