"""`unmask mine`."""

from typing import Annotated

from cyclopts import Parameter

from unmask.cli.terminal import say


def mine(
    source: str,
    /,
    *,
    model: str,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    query: str = "query",
    positive: str = "positive",
    corpus: str | None = None,
    text: str = "text",
    count: int = 7,
    skip: int = 0,
    max_share: float | None = 0.95,
    margin: float | None = None,
    instruction: str = "",
    symmetric: Annotated[bool, Parameter(negative=())] = False,
    max_bad_rows: float = 0.01,
) -> int:
    """Find hard negatives: near texts that are not the answer. Interrupted and run again, it continues.

    Parameters
    ----------
    source
        A file with a query and a positive per row (jsonl, tsv, csv, parquet), or hf:owner/name:config:split.
    model
        Whose vectors decide, written as for `unmask evaluate`.
    output
        JSON lines with query, positive and negatives, as a recipe takes them.
    query
        Column of the query.
    positive
        Column of its positive.
    corpus
        File that negatives are taken from. Left out: the positives of all rows.
    text
        The corpus's column.
    count
        Negatives per row, at most.
    skip
        Pass over so many of the nearest texts, whatever their similarity.
    max_share
        A negative is less similar to the query than this share of the positive's similarity.
    margin
        And less similar than the positive by this much.
    instruction
        Given to queries; to texts as well with --symmetric.
    symmetric
        Query and positive are the same kind of text.
    max_bad_rows
        Share of unreadable rows past which to stop.
    """
    from pathlib import Path

    from rich.console import Console

    from unmask.evaluate.models import open_model
    from unmask.training.mining import Mining
    from unmask.training.mining import mine as run_mining
    from unmask.training.terminal import mining_bar

    mining = Mining(
        source=source,
        query=query,
        positive=positive,
        corpus=corpus,
        text=text,
        count=count,
        skip=skip,
        max_share=max_share,
        margin=margin,
        instruction=instruction,
        symmetric=symmetric,
        max_bad_rows=max_bad_rows,
    )
    with mining_bar(Console(stderr=True)) as report_progress:
        done = run_mining(mining, open_model(model), Path(output), report_progress)
    got = ", ".join(f"{rows} got {negatives}" for negatives, rows in enumerate(done.found) if rows)
    say(f"{done.rows} rows over {done.texts} texts -> {output}: {got}; the margin refused {done.refused} candidates")
    return 0
