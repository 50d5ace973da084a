"""`unmask encode`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from unmask.accounts.money import NANO
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.storage import public_name
from unmask.checkpoint import DEFAULT_MODEL
from unmask.cli.known_models import checks_known_models
from unmask.cli.options import THIS_PROCESS, AsJson, DeviceOption, DtypeOption, amount_option
from unmask.cluster.options import ClusterOptions
from unmask.errors import UsageError
from unmask.terminal import JsonProgress, Progress, Step, print_json, print_table, say

if TYPE_CHECKING:
    from unmask.bulk.job import EncodeProgress
    from unmask.bulk.report import EncodeReport
    from unmask.encoder import Encoder

_FILES = Group.create_ordered("Files and texts")
_MODEL = Group.create_ordered("Model")
_CLUSTER = Group.create_ordered("Cluster")


@dataclass(frozen=True)
class EncodeOptions(EncodeJob):
    """`EncodeJob` as options. Here are the fields whose option differs from the field.

    Both may be left out with --status.
    """

    inputs: Annotated[tuple[str, ...], Parameter(name="INPUT", allow_leading_hyphen=True)] = ()  # for "-"
    output: Annotated[str, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)] = field(
        default="", kw_only=True
    )


@Parameter(name="*", group=_MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to encode with.

    Attributes:
        model: Shipped id, hub id, folder or .gguf file.
        adapter: LoRA adapter to merge into the model. Repeat it to merge several, in this order.
        pooling: mean, weighted_mean, eos_token, last_token, first_token or bos_token. Default: the model's own, else
            mean.
        max_length: Most tokens of a text, special tokens included. Default: the model's own, else 512.
        compat: "reference" gives the published LLM2Vec vectors, quirks included.
    """

    model: str = DEFAULT_MODEL
    adapter: tuple[str, ...] = ()
    pooling: str | None = None
    max_length: int | None = None
    compat: Literal["default", "reference"] = "default"
    dtype: DtypeOption = "auto"
    device: DeviceOption = "cpu"

    def load(self) -> "Encoder":
        """Load the encoder."""
        from unmask.encoder import Encoder

        return Encoder.load(
            self.model,
            adapters=self.adapter,
            compat=self.compat,
            pooling=self.pooling,
            max_length=self.max_length,
            dtype=self.dtype,
            device=self.device,
        )


@checks_known_models
def encode(
    job: Annotated[EncodeOptions, Parameter(name="*", group=_FILES)] = EncodeOptions(),
    *,
    model: ModelOptions = ModelOptions(),
    cluster: Annotated[ClusterOptions, Parameter(name="*", group=_CLUSTER)] = THIS_PROCESS,
    status: Annotated[str | None, Parameter(group=_FILES)] = None,
    progress: Literal["text", "json"] = "text",
    price_per_hour: Annotated[int | None, amount_option(), Parameter(group=_CLUSTER)] = None,
    as_json: AsJson = False,
) -> int:
    """Encode files of texts into a file or a folder of vectors.

    An interrupted run continues when you repeat the command. The output is the same to the byte.

    Parameters
    ----------
    status
        Folder or URL of parts: say how far it is, and encode nothing.
    progress
        Progress on stderr as text, or as a JSON object per line: rows, total, tokens, tokens_per_second, workers,
        redone, seconds, seconds_left.
    price_per_hour
        What an hour of a worker, or of this machine without --cluster, costs you in dollars: say at the end what the
        run cost.
    """
    if status is not None:
        return _print_status(status, as_json)
    if not job.inputs:
        raise UsageError("no input: name files or folders of texts, or - for standard input")
    if not job.output:
        raise UsageError("no output: add --output with a file, a folder of parts (FOLDER/), a URL, or -")
    if cluster.worker_gpus and not model.device.startswith("cuda"):
        raise UsageError(f"--worker-gpus {cluster.worker_gpus:g} needs --device cuda; the device is {model.device}")
    from unmask.bulk.executor import local_executor
    from unmask.bulk.job import run

    open_executor: Any = local_executor
    if cluster.cluster is not None:
        from unmask.cluster.bulk import cluster_executor

        open_executor = partial(cluster_executor, cluster)
    if progress == "json":
        report = run(job, model.load, _json_line(JsonProgress()), open_executor)
    else:
        with Progress() as display:
            report = run(job, model.load, lambda state: display.show(_step(state)), open_executor)
    if as_json and job.output != "-":
        print_json(asdict(report))
    _say_report(report, job.output)
    if price_per_hour is not None:
        say(_cost_of(report, price_per_hour))
    return 0


def _cost_of(report: "EncodeReport", price_per_hour: int) -> str:
    """Return a sentence that says what a run cost at a price in nano-dollars."""
    hours = report.worker_seconds / 3600
    dollars = hours * price_per_hour / NANO
    sentence = f"cost: {hours:.4g} hours of workers, ${dollars:.4g}"
    if report.resumed_at or not report.tokens:
        return sentence
    return f"{sentence}, ${dollars / report.tokens * 1e6:.4g} per million tokens"


def _say_report(report: "EncodeReport", output: str) -> None:
    """Tell what was encoded, on stderr."""
    done = f"{report.rows} texts, {report.tokens} tokens, {report.seconds:.1f} s"
    say(f"{done}, {report.precision} -> {public_name(output)}")
    if report.resumed_at:
        say(f"continued an earlier run at text {report.resumed_at}")
    if report.truncated:
        say(f"{report.truncated} texts were cut to fit the model; --on-long error refuses them instead")
    if report.empty:
        say(f"{report.empty} empty texts have no vector")
    for name in report.left_out[:1]:
        others = f" and {len(report.left_out) - 1} more" if len(report.left_out) > 1 else ""
        say(f"left out, as the name does not tell the format: {name}{others}")
    if report.processors > 1:
        say(f"{report.processors} kinds of processors made these vectors; their last bits may differ")
    if report.redone:
        say(f"{report.redone} pieces of work were given to another worker, because theirs was lost")


def _print_status(output: str, as_json: bool) -> int:
    from unmask.bulk.parts import read_status

    status = read_status(output)
    counts = asdict(status)
    if as_json:
        print_json(counts | counts.pop("tally"))
        return 0
    rows = [
        ("state", status.state),
        ("rows", f"{status.tally.rows:,}"),
        ("tokens", f"{status.tally.tokens:,}"),
        ("parts", f"{status.units:,}"),
        ("texts cut to fit", f"{status.tally.truncated:,}"),
        ("empty texts", f"{status.tally.empty:,}"),
        ("inputs", f"{len(status.inputs):,}"),
        ("model", str(status.options["model"])),
        ("precision", str(status.options["dtype"])),
        ("kinds of processors", str(status.processors)),
        ("sha256 over all parts", status.sha256 or "-"),
    ]
    print_table(("", public_name(output)), rows)
    return 0


def _step(state: "EncodeProgress") -> Step:
    details = [f"{state.tokens / state.seconds:,.0f} tokens/s" if state.seconds else ""]
    if state.activity.workers != 1:
        details.append(f"{state.activity.workers} workers")
    if state.activity.redone:
        details.append(f"{state.activity.redone} redone")
    return Step("encode", state.rows, state.total, "rows", tuple(details))


def _json_line(progress: JsonProgress) -> "Callable[[EncodeProgress], None]":
    """Return a function that writes states of a job as JSON."""
    first: int | None = None

    def show(state: "EncodeProgress") -> None:
        nonlocal first
        first = state.rows if first is None else first
        encoded = state.rows - first
        left = None
        if state.total is not None and encoded > 0:
            left = round(max(state.total - state.rows, 0) * state.seconds / encoded, 1)
        progress.show(
            {
                "rows": state.rows,
                "total": state.total,
                "tokens": state.tokens,
                "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
                "workers": state.activity.workers,
                "redone": state.activity.redone,
                "seconds": round(state.seconds, 3),
                "seconds_left": left,
            },
            last=state.rows == state.total,
        )

    return show
