"""`unmask evaluate`, and what is done with its results."""

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from unmask.cli.terminal import say


def evaluate(
    *models: str,
    suite: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    task: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    data: str | None = None,
    baseline: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    output: Annotated[str, Parameter(name=["--output", "-o"])] = "evaluation",
    published: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    device: str = "cpu",
) -> int:
    """Measure models on MTEB, on offline suites and at word level, and write a report.

    Run again, it continues: what is finished in the output folder is not measured twice.

    Parameters
    ----------
    models
        What to measure; the report is about the first. A decoder's id, folder or .gguf file, a sentence-transformers
        folder, wordllama:default, or an endpoint http://host/v1#model. Options follow: MODEL?causal&name=uni.
        Left out: unmask/smollm2-135m-embed.
    suite
        local, llm2vec-15, mteb-eng-v1 or mteb-eng-v2. May be repeated. Left out, with no --task: local.
    task
        A task by mteb's name, an offline or a word-level one. May be repeated.
    data
        Folder that offline and word-level tasks are read from.
    baseline
        A model to hold the others against, written as they are. May be repeated.
    output
        Folder for results.json, report.html, report.md, the values per example, and mteb's own result files.
    published
        Folder of published MTEB scores. Left out: mteb_results in --data.
    dtype
        Precision of a decoder's weights; ?dtype= sets it for one.
    device
        A torch device, such as cpu or cuda.
    """
    import shlex
    from pathlib import Path

    from unmask.checkpoint.resolve import DEFAULT_MODEL
    from unmask.evaluate.run import Evaluation
    from unmask.evaluate.run import evaluate as run_evaluation

    results = run_evaluation(
        Evaluation(
            models=models or (DEFAULT_MODEL,),
            baselines=baseline,
            suites=suite if suite or task else ("local",),
            tasks=task,
            data=Path(data) if data else None,
            output=Path(output),
            published=Path(published) if published else None,
            defaults={"dtype": dtype, "device": device},
            command=shlex.join(["unmask", *sys.argv[1:]]),
        )
    )
    failed = [f"{score.task} of {model.name}" for model in results.models for score in model.scores if score.error]
    say(f"{sum(len(model.scores) for model in results.models) - len(failed)} scores -> {output}/report.html")
    if failed:
        say(f"{len(failed)} failed, and the report says why: {', '.join(failed)}")
    return 1 if failed else 0


def report(folder: str, /, *, published: str | None = None) -> int:
    """Write report.html and report.md again from the results in a folder; no model is needed.

    Parameters
    ----------
    folder
        A folder that `unmask evaluate` wrote.
    published
        Folder of published MTEB scores; adds a chart of other people's models.
    """
    from pathlib import Path

    from unmask.evaluate.report import write_report
    from unmask.evaluate.results import read_results

    results = read_results(Path(folder))
    write_report(Path(folder), results, published=Path(published) if published else None)
    say(f"{len(results.models)} models -> {Path(folder) / 'report.html'}, report.md")
    return 0


def compare(
    a: str,
    b: str,
    /,
    *,
    task: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    texts: str | None = None,
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
) -> int:
    """Say which of two models is better, on what, by how much, and whether it is more than noise.

    Parameters
    ----------
    a
        A folder that `unmask evaluate` wrote; FOLDER:MODEL for another than its first model.
    b
        The other one. May be another model in the same folder.
    task
        Compare only on this task. May be repeated.
    texts
        File with one text per line: also say how far the vectors moved. A and B may then be models.
    output
        Write the comparison to a file as well: .html, .md or .json.
    """
    from pathlib import Path

    from rich.console import Console

    from unmask.evaluate.compare import compare_by_name
    from unmask.evaluate.report import output_file, print_comparison, print_drift, write_comparison

    file = output_file(output) if output else None
    comparison, drift = compare_by_name(a, b, task, Path(texts) if texts else None)
    if comparison:
        print_comparison(comparison, Console())
    if drift:
        print_drift(drift, Console())
    if file:
        write_comparison(file, comparison, drift)
    return 0
