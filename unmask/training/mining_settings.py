"""`MiningSettings`: which rows to mine negatives for. This module imports no numpy, for the command line."""

from dataclasses import dataclass

from unmask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MiningSettings:
    """Rows to mine negatives for, and the limits of a negative. These fields are options of `unmask mine`.

    Attributes:
        source: File with a query and a positive per row (jsonl, tsv, csv, parquet), or hf:owner/name:config:split.
        query: Column of the query.
        positive: Column of the positive.
        corpus: File to take negatives from. Default: the positives of all rows.
        text: Column of the corpus.
        count: Most negatives per row.
        skip: Pass over the N nearest texts, whatever their similarity.
        max_share: A negative is less similar to the query than this share of the positive's similarity (0.95 was best
            in NV-Retriever).
        margin: A negative is less similar to the query than the positive by at least this much.
        instruction: Instruction for queries; with --symmetric for texts as well.
        symmetric: Query and positive are texts of the same kind.
        max_bad_rows: Stop if a larger share of the rows cannot be read.
    """

    source: str
    query: str = "query"
    positive: str = "positive"
    corpus: str | None = None
    text: str = "text"
    count: int = 7
    skip: int = 0
    max_share: float | None = 0.95
    margin: float | None = None
    instruction: str = ""
    symmetric: bool = False
    max_bad_rows: float = 0.01

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0:
            raise UsageError(f"count={self.count}, skip={self.skip}: one negative or more, skipping none or more")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise UsageError(f"max_share={self.max_share}: a share of the positive's similarity, above 0 and up to 1")
        if not 0 <= self.max_bad_rows <= 1:
            raise UsageError(f"max_bad_rows={self.max_bad_rows}: a share of the rows, 0 to 1")
        if self.margin is not None and not 0 <= self.margin < 2:
            raise UsageError(f"margin={self.margin}: a difference of cosines, 0 or more")
