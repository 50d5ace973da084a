"""`unmask encode`."""

from typing import Annotated, Literal

from cyclopts import Parameter

from unmask.cli.terminal import say


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
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
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
    from unmask.bulk.job import EncodeJob, Progress, run
    from unmask.checkpoint.resolve import DEFAULT_MODEL

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
    say(f"{report.rows} texts, {report.tokens} tokens, {report.seconds:.1f} s -> {output}")
    if report.resumed_at:
        say(f"continued an earlier run at text {report.resumed_at}")
    if report.truncated:
        say(f"{report.truncated} texts were cut to fit the model; --on-long error refuses them instead")
    if report.empty:
        say(f"{report.empty} empty texts have no vector")
    return 0
