"""The command line: parses, calls the rooms, prints. Nothing is decided here."""

import sys
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from unmask import __version__
from unmask.errors import UnmaskError

app = App(
    name="unmask",
    help="Turn a decoder-only LLM into a text encoder, and serve its vectors behind an OpenAI-compatible API.",
    version=f"unmask {__version__}",
    version_flags=["--version", "-V"],
)
_LIMITS = Group("Limits")


@app.command
def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    model: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    warm: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    api_key_file: str | None = None,
    request_timeout: Annotated[float, Parameter(group=_LIMITS)] = 60.0,
    body_limit_mb: Annotated[float, Parameter(group=_LIMITS)] = 32.0,
    queue_tokens: Annotated[int, Parameter(group=_LIMITS)] = 262_144,
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> int:
    """Answer POST /v1/embeddings for one or more models.

    Parameters
    ----------
    host
        Address to listen on. Anything but this machine's own needs --api-key-file.
    port
        Port to listen on; 0 lets the system choose.
    model
        Model to serve: a shipped id, a hub id, a folder or a .gguf file. May be repeated.
        The first is loaded at start. Left out: unmask/smollm2-135m-embed.
    warm
        Another model to load at start rather than on first use. May be repeated.
    api_key_file
        File with one API key per line; callers must present one as "Authorization: Bearer KEY".
    request_timeout
        Seconds a request may take when its client names no deadline.
    body_limit_mb
        Largest request body, in megabytes.
    queue_tokens
        Tokens that may wait per model before requests are refused with 429.
    log_level
        What is logged to stderr.
    """
    from unmask.api.server import serve as run_server
    from unmask.api.settings import ServeSettings
    from unmask.checkpoint.resolve import DEFAULT_MODEL

    models = model or (DEFAULT_MODEL,)
    return run_server(
        ServeSettings(
            host=host,
            port=port,
            models=models,
            warm=(models[0], *warm),
            api_keys=_read_keys(api_key_file) if api_key_file else (),
            request_timeout_s=request_timeout,
            body_limit_bytes=int(body_limit_mb * 1_000_000),
            queue_tokens=queue_tokens,
            log_level=log_level,
        )
    )


@app.command
def encode(
    input: Annotated[str, Parameter(allow_leading_hyphen=True)],  # for "-"
    /,
    *,
    output: Annotated[str, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)],
    model: str | None = None,
    adapter: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    instruction: str = "",
    column: str = "text",
    normalize: Annotated[bool, Parameter(negative=())] = False,
    dimensions: int | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    compat: Literal["default", "reference"] = "default",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    input_format: Literal["txt", "jsonl", "csv", "tsv", "parquet"] | None = None,
    output_format: Literal["npy", "parquet", "jsonl"] | None = None,
    on_empty: Literal["error", "null"] = "error",
    on_long: Literal["truncate", "error"] = "truncate",
    restart: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Encode a file of texts. Interrupted and run again, it continues, and the result is the same to the byte.

    Parameters
    ----------
    input
        txt (one text per line), jsonl, csv, tsv or parquet; "-" for standard input.
    output
        npy, parquet or jsonl; "-" for standard output.
    model
        A shipped id, a hub id, a folder or a .gguf file. Left out: unmask/smollm2-135m-embed.
    adapter
        LoRA adapter to merge into the model. May be repeated; merged in this order.
    instruction
        What to look for; read by the model, never averaged into the vectors.
    column
        Column or field that holds the text (jsonl, csv, tsv, parquet).
    normalize
        Scale each vector to length 1.
    dimensions
        Keep only the first so many numbers of each vector.
    pooling
        mean, weighted_mean, eos_token, last_token or bos_token. Left out: as the model says, else mean.
    max_length
        Tokens per text, everything counted. Left out: as the model says, else 512.
    compat
        "reference" gives the published LLM2Vec vectors, quirks included.
    dtype
        Precision of the weights.
    device
        A torch device, such as cpu or cuda.
    input_format
        Needed when it does not show in the file's name.
    output_format
        Needed when it does not show in the file's name.
    on_empty
        An empty text stops the run, or becomes a row without a vector.
    on_long
        A text that does not fit is cut and counted, or stops the run.
    restart
        Discard an unfinished run and replace a finished output.
    """
    from unmask.checkpoint.resolve import DEFAULT_MODEL
    from unmask.encoder.job import EncodeJob, Progress, run

    job = EncodeJob(
        input=input,
        output=output,
        input_format=input_format,
        output_format=output_format,
        column=column,
        instruction=instruction,
        normalize=normalize,
        dimensions=dimensions,
        on_empty=on_empty,
        on_long=on_long,
        restart=restart,
    )

    def load():
        from unmask.encoder import Encoder

        return Encoder.load(
            model or DEFAULT_MODEL,
            adapters=adapter,
            compat=compat,
            pooling=pooling,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )

    report = run(job, load, Progress())
    _say(f"{report.rows} texts, {report.tokens} tokens, {report.seconds:.1f} s -> {output}")
    if report.resumed_at:
        _say(f"continued an earlier run at text {report.resumed_at}")
    if report.truncated:
        _say(f"{report.truncated} texts were cut to fit the model; --on-long error refuses them instead")
    if report.empty:
        _say(f"{report.empty} empty texts have no vector")
    return 0


@app.command
def evaluate(
    *models: str,
    suite: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    task: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    data: str | None = None,
    baseline: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    output: Annotated[str, Parameter(name=["--output", "-o"])] = "evaluation",
    published: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
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
    _say(f"{sum(len(model.scores) for model in results.models) - len(failed)} scores -> {output}/report.html")
    if failed:
        _say(f"{len(failed)} failed, and the report says why: {', '.join(failed)}")
    return 1 if failed else 0


@app.command
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
    _say(f"{len(results.models)} models -> {Path(folder) / 'report.html'}, report.md")
    return 0


@app.command
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

    from unmask.evaluate.compare import compare_named
    from unmask.evaluate.report import output_file, print_comparison, print_drift, write_comparison

    file = output_file(output) if output else None
    comparison, drift = compare_named(a, b, task, Path(texts) if texts else None)
    if comparison:
        print_comparison(comparison, Console())
    if drift:
        print_drift(drift, Console())
    if file:
        write_comparison(file, comparison, drift)
    return 0


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

        print_plan(plan(chosen, folder, _say), Console())
        return 0
    if output is None:
        raise UsageError("--output names the folder of the run; --dry-run needs none")
    from unmask.recipe.terminal import training_bar
    from unmask.recipe.train import train as run_training

    with training_bar(Console(stderr=True)) as progress:
        outcome = run_training(chosen, data=folder, output=Path(output), resume=resume, progress=progress, say=_say)
    scores = "".join(f", {name} {score:.2f}" for name, score in outcome.scores.items())
    _say(f"{chosen.steps} steps -> {outcome.result}{scores}")
    return 0


@app.command
def models() -> int:
    """List the models that ship, and what is already stored on this machine."""
    from rich.console import Console
    from rich.table import Table

    from unmask.catalogue import shipped_records
    from unmask.home import home

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("dimensions", "tokens", "licence", "stored", "summary"):
        table.add_column(heading)
    for record in shipped_records().values():
        stored = any((home() / "models" / record.id).glob("*.gguf"))
        row = (record.id, record.dimensions, record.max_tokens, record.licence, "yes" if stored else "no")
        table.add_row(*("?" if value is None else str(value) for value in row), record.summary)
    Console().print(table)
    _say("Any hub id, folder in the hub's layout or .gguf file can be named as well.")
    return 0


def main() -> None:
    """Entry point: a user's own mistake is one line on stderr and exit code 1, never a traceback."""
    try:
        sys.exit(app())
    except UnmaskError as error:
        _say(f"unmask: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("unmask: interrupted; run the same command again to continue")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our pipe has gone, as in `unmask encode ... --output - | head`.
        sys.stderr.close()
        sys.exit(141)


def _read_keys(path: str) -> tuple[str, ...]:
    from pathlib import Path

    from unmask.errors import UsageError

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one per line")
    return keys


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - talking to the user is this module's work


if __name__ == "__main__":
    main()
