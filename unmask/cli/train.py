"""`unmask train`, and what goes before and after it: mining and merging."""

from typing import Annotated, Literal

from cyclopts import App, Parameter

from unmask.cli.program import app, say


@app.command
def train(
    recipe: str,
    /,
    *,
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
    data: str | None = None,
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Train an encoder from a decoder, as a recipe says.

    Parameters
    ----------
    recipe
        A TOML file; recipes/ has the published ones and ours, docs/training.md says what may stand in it.
    output
        Folder of the run: checkpoints, metrics, and at the end the adapter or model.
    data
        Folder that the recipe's paths are taken from. Left out: the recipe's own folder.
    set
        Override a field, as in --set optimiser.lr=1e-4 or --set data.nli.limit=1000. May be repeated.
    resume
        Continue the run that is in the output folder.
    dry_run
        Read the data and print counts, tokens, memory and time; train nothing.
    """
    from pathlib import Path

    from rich.console import Console

    from unmask.errors import UsageError
    from unmask.recipe.recipe import read_recipe

    chosen = read_recipe(Path(recipe), set)
    folder = Path(data) if data else Path(recipe).parent
    if dry_run:
        from unmask.recipe.plan import plan
        from unmask.recipe.terminal import print_plan

        print_plan(plan(chosen, folder, say), Console())
        return 0
    if output is None:
        raise UsageError("--output names the folder of the run; --dry-run needs none")
    from unmask.recipe.terminal import training_bar
    from unmask.recipe.train import train as run_training

    with training_bar(Console(stderr=True)) as progress:
        outcome = run_training(chosen, data=folder, output=Path(output), resume=resume, progress=progress, say=say)
    if not outcome.first:
        return 0
    scores = "".join(f", {name} {score:.2f}" for name, score in outcome.scores.items())
    say(f"{chosen.steps} steps -> {outcome.result}{scores}")
    return 0


@app.command
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
    from unmask.recipe.mining import Mining
    from unmask.recipe.mining import mine as run_mining
    from unmask.recipe.terminal import mining_bar

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
    with mining_bar(Console(stderr=True)) as told:
        done = run_mining(mining, open_model(model), Path(output), told)
    got = ", ".join(f"{rows} got {negatives}" for negatives, rows in enumerate(done.found) if rows)
    say(f"{done.rows} rows over {done.texts} texts -> {output}: {got}; the margin refused {done.refused} candidates")
    return 0


merge = App(name="merge", help="Make one model or adapter out of several.")
app.command(merge)
_Output = Annotated[str, Parameter(name=["--output", "-o"])]
_Dtype = Literal["float32", "bfloat16", "float16"]


@merge.command(name="adapters")
def merge_adapters(base: str, /, *adapters: str, output: _Output, dtype: _Dtype = "float32") -> int:
    """Add adapters to the weights of a base, and write a model that transformers reads too.

    Parameters
    ----------
    base
        A decoder. The name of an adapter means its base and the adapters below it.
    adapters
        Adapters, merged in this order.
    output
        A new folder in the hub's layout.
    dtype
        Precision of the file.
    """
    from pathlib import Path

    from unmask.recipe.merging import merge_adapters as run

    run(base, adapters, Path(output), dtype)
    say(f"{base} with {' + '.join(adapters) or 'its adapters'} -> {output}")
    return 0


@merge.command
def linear(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Write the model between two, along the straight line.

    Parameters
    ----------
    a
        A model, or an adapter, whose base is found by its name.
    b
        Another of the same architecture.
    output
        A new folder in the hub's layout.
    weight
        0 is A, 1 is B.
    dtype
        Precision of the file.
    """
    return _interpolate(a, b, output, weight, "linear", dtype)


@merge.command
def slerp(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Write the model between two, turning each tensor at a constant speed.

    Parameters
    ----------
    a
        A model, or an adapter, whose base is found by its name.
    b
        Another of the same architecture.
    output
        A new folder in the hub's layout.
    weight
        0 is A, 1 is B.
    dtype
        Precision of the file.
    """
    return _interpolate(a, b, output, weight, "slerp", dtype)


@merge.command
def average(*models: str, output: _Output, rank: int | None = None, dtype: _Dtype = "float32") -> int:
    """Write the mean of several checkpoints, usually of one run.

    Parameters
    ----------
    models
        Adapters, checkpoints/step-N folders of a run, or whole models; or one run's folder, for all its checkpoints.
    output
        A new folder: an adapter, or a model.
    rank
        Of the resulting adapter, with the nearest that has it. Left out: the sum of their ranks, which is exact.
    dtype
        Precision of a resulting model.
    """
    from pathlib import Path

    from unmask.recipe.merging import average as run

    done = run(models, Path(output), rank, dtype)
    say(f"the mean of {' '.join(models)} -> {output}{_told(done.rank, done.error)}")
    return 0


@merge.command
def stack(*adapters: str, output: _Output, rank: int | None = None) -> int:
    """Write one adapter that does what several do when merged in turn.

    Parameters
    ----------
    adapters
        Adapters in merging order, each trained on the base of the first or on top of those before it.
    output
        A new folder.
    rank
        Of the result, with the nearest adapter that has it. Left out: the sum of their ranks, which is exact.
    """
    from pathlib import Path

    from unmask.recipe.merging import stack as run

    done = run(adapters, Path(output), rank)
    say(f"{' + '.join(adapters)} -> {output}{_told(done.rank, done.error)}")
    return 0


def _interpolate(a: str, b: str, output: str, weight: float, method: Literal["linear", "slerp"], dtype: _Dtype) -> int:
    from pathlib import Path

    from unmask.recipe.merging import interpolate

    interpolate(a, b, weight, Path(output), method, dtype)
    say(f"{weight:g} of the way from {a} to {b} -> {output}")
    return 0


def _told(rank: int, error: float) -> str:
    if not rank:
        return ""
    return f", rank {rank}" + (f"; {error:.2%} of the update's norm is lost" if error else ", exact")
