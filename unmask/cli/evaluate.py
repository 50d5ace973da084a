"""`unmask evaluate`, and what is done with its results."""

import sys
from typing import Annotated

from cyclopts import Parameter

from unmask.cli.known_models import checks_known_models
from unmask.cli.options import AsJson, DeviceOption, DtypeOption
from unmask.terminal import say


@checks_known_models
def evaluate(
    *models: str,
    suite: tuple[str, ...] = (),
    task: tuple[str, ...] = (),
    data: str | None = None,
    baseline: tuple[str, ...] = (),
    output: Annotated[str, Parameter(name=["--output", "-o"])] = "evaluation",
    published: str | None = None,
    dtype: DtypeOption | None = None,
    device: DeviceOption = "cpu",
) -> int:
    """Measure models on benchmarks and write a report.

    The benchmarks are MTEB, offline suites and word-level tasks. An interrupted run continues when you repeat the
    command: finished tasks in the output folder are not measured again.

    Parameters
    ----------
    models
        Models to measure; the report is about the first. Each is a decoder's id, folder or .gguf file, a
        sentence-transformers folder, wordllama:default, or an endpoint http://host/v1#model. Options follow a
        question mark: MODEL?causal&name=uni. Default: unmask/smollm2-embed-6l.
    suite
        local, llm2vec-15, mteb-eng-v1 or mteb-eng-v2. Repeat it for several. Default without --task: local.
    task
        Task of MTEB, or an offline or word-level task. Repeat it for several.
    data
        Folder with the data of offline and word-level tasks.
    baseline
        Model to compare the others with. Repeat it for several.
    output
        Folder for results.json, report.html, report.md, the values per example and MTEB's own result files.
    published
        Folder with published MTEB scores. Default: mteb_results in --data.
    dtype
        Default: auto for a single model, and float32 where several are compared.
    """
    import shlex
    from pathlib import Path

    from unmask.checkpoint import DEFAULT_MODEL
    from unmask.evaluate.run import Evaluation, run_evaluation

    results = run_evaluation(
        Evaluation(
            models=models or (DEFAULT_MODEL,),
            baselines=baseline,
            suites=suite if suite or task else ("local",),
            tasks=task,
            data=Path(data) if data else None,
            output=Path(output),
            published=Path(published) if published else None,
            defaults={"device": device} | ({} if dtype is None else {"dtype": dtype}),
            command=shlex.join(["unmask", *sys.argv[1:]]),
        )
    )
    failed = [f"{score.task} of {model.name}" for model in results.models for score in model.scores if score.error]
    say(f"{sum(len(model.scores) for model in results.models) - len(failed)} scores -> {output}/report.html")
    if failed:
        say(f"{len(failed)} failed, and the report says why: {', '.join(failed)}")
    return 1 if failed else 0


def report(folder: str, /, *, published: str | None = None) -> int:
    """Write the report again from stored results. No model is needed.

    Parameters
    ----------
    folder
        Folder that "unmask evaluate" wrote.
    published
        Folder with published MTEB scores. Adds a chart of other people's models.
    """
    from pathlib import Path

    from unmask.evaluate.report import write_report
    from unmask.evaluate.results import read_results

    results = read_results(Path(folder))
    write_report(Path(folder), results, published=Path(published) if published else None)
    say(f"{len(results.models)} models -> {Path(folder) / 'report.html'}, report.md")
    return 0


@checks_known_models
def compare(
    a: str,
    b: str,
    /,
    *,
    task: tuple[str, ...] = (),
    texts: str | None = None,
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
    as_json: AsJson = False,
) -> int:
    """Compare two models, with a test of significance.

    Parameters
    ----------
    a
        Folder that "unmask evaluate" wrote; FOLDER:MODEL names another than its first model.
    b
        The other folder, or another model in the same folder.
    task
        Compare on this task only. Repeat it for several.
    texts
        File with one text per line: compare the vectors of these texts as well. A and B may then be models.
    output
        Also write the comparison to this file: .html, .md or .json.
    """
    from pathlib import Path

    from unmask.evaluate.compare import compare_by_name
    from unmask.evaluate.report import (
        output_file,
        print_comparison,
        print_comparison_json,
        print_drift,
        write_comparison,
    )

    file = output_file(output) if output else None
    comparison, drift = compare_by_name(a, b, task, Path(texts) if texts else None)
    if as_json:
        print_comparison_json(comparison, drift)
    else:
        if comparison:
            print_comparison(comparison)
        if drift:
            print_drift(drift)
    if file:
        write_comparison(file, comparison, drift)
    return 0
