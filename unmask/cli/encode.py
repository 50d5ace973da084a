"""`unmask encode`."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.storage import public_name
from unmask.checkpoint import DEFAULT_MODEL
from unmask.cli.known_models import checks_known_models
from unmask.cli.options import AsJson, DeviceOption, DtypeOption
from unmask.errors import UsageError
from unmask.terminal import Progress, Step, print_json, print_table, say

if TYPE_CHECKING:
    from unmask.bulk.job import EncodeProgress
    from unmask.encoder import Encoder

_FILES = Group.create_ordered("Files and texts")
_MODEL = Group.create_ordered("Model")


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
        pooling: mean, weighted_mean, eos_token, last_token or bos_token. Default: the model's own, else mean.
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
    status: Annotated[str | None, Parameter(group=_FILES)] = None,
    as_json: AsJson = False,
) -> int:
    """Encode files of texts into a file or a folder of vectors.

    An interrupted run continues when you repeat the command. The output is the same to the byte.

    Parameters
    ----------
    status
        Folder or URL of parts: say how far it is, and encode nothing.
    """
    if status is not None:
        return _print_status(status, as_json)
    if not job.inputs:
        raise UsageError("no input: name files or folders of texts, or - for standard input")
    if not job.output:
        raise UsageError("no output: add --output with a file, a folder of parts (FOLDER/), a URL, or -")
    from unmask.bulk.job import run

    with Progress() as progress:
        report = run(job, model.load, lambda state: progress.show(_step(state)))
    if as_json and job.output != "-":
        print_json(asdict(report))
    done = f"{report.rows} texts, {report.tokens} tokens, {report.seconds:.1f} s"
    say(f"{done}, {report.precision} -> {public_name(job.output)}")
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
    return 0


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
    speed = f"{state.tokens / state.seconds:,.0f} tokens/s" if state.seconds else ""
    return Step("encode", state.rows, state.total, "rows", (speed,))
