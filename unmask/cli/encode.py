"""`unmask encode`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from unmask.bulk.encode_job import EncodeJob
from unmask.checkpoint import DEFAULT_MODEL
from unmask.cli.options import DeviceOption, DtypeOption
from unmask.terminal import Progress, Step, say

if TYPE_CHECKING:
    from unmask.bulk.job import EncodeProgress
    from unmask.encoder import Encoder

_FILES = Group.create_ordered("Files and texts")
_MODEL = Group.create_ordered("Model")


@dataclass(frozen=True)
class EncodeOptions(EncodeJob):
    """`EncodeJob` as options. Here are the fields whose option differs from the field."""

    input: Annotated[str, Parameter(name="INPUT", allow_leading_hyphen=True)]  # for "-"
    output: Annotated[str, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)] = field(kw_only=True)


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
    dtype: DtypeOption = "float32"
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


def encode(
    job: Annotated[EncodeOptions, Parameter(name="*", group=_FILES)], *, model: ModelOptions = ModelOptions()
) -> int:
    """Encode a file of texts into a file of vectors.

    An interrupted run continues when you repeat the command. The output is the same to the byte.
    """
    from unmask.bulk.job import run

    with Progress() as progress:
        report = run(job, model.load, lambda state: progress.show(_step(state)))
    say(f"{report.rows} texts, {report.tokens} tokens, {report.seconds:.1f} s -> {job.output}")
    if report.resumed_at:
        say(f"continued an earlier run at text {report.resumed_at}")
    if report.truncated:
        say(f"{report.truncated} texts were cut to fit the model; --on-long error refuses them instead")
    if report.empty:
        say(f"{report.empty} empty texts have no vector")
    return 0


def _step(state: "EncodeProgress") -> Step:
    speed = f"{state.tokens / state.seconds:,.0f} tokens/s" if state.seconds else ""
    return Step("encode", state.rows, state.total, "rows", (speed,))
