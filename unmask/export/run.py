"""`run_export`: verdict, files, parity, model card, in this order; and `run_parity` of files that are there."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.checkpoint import Checkpoint
from unmask.encoder import Encoder
from unmask.encoder.loading import LoadOptions
from unmask.errors import ExportError, MissingPackages, UsageError
from unmask.export.capabilities import (
    DTYPES,
    TARGETS,
    ExportedModel,
    ExportVerdict,
    Target,
    describe_model,
    judge,
    traits_of,
)
from unmask.export.hub import vector_size, write_hub_folder
from unmask.export.model_card import CardFacts, model_card
from unmask.export.parity import ParityReport, check_parity
from unmask.training.model_folder import require_new, write_json


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Everything that decides an export.

    Attributes:
        model: id, folder or file.
        target: format.
        output: new folder.
        dtype: precision of the weights in the files.
        instructions: by name; they replace the model's own of that name.
        dimensions: Matryoshka length to cut vectors to.
        allow_inexact: write files that cannot give the model's own vectors.
        check: measure parity of the files.
        texts: other texts to measure it with than those that ship.
        facts: for the model card.

    Raises:
        UsageError: a value does not exist.
    """

    model: str
    target: Target
    output: Path
    dtype: str = "float32"
    instructions: Mapping[str, str] = field(default_factory=dict)
    dimensions: int | None = None
    allow_inexact: bool = False
    check: bool = True
    texts: Sequence[str] = ()
    facts: CardFacts | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"--to {self.target!r}: choose one of {', '.join(TARGETS)}")
        if self.dtype not in DTYPES[self.target]:
            raise UsageError(f"--dtype {self.dtype!r} with --to {self.target}: choose {', '.join(DTYPES[self.target])}")


def run_export(options: ExportOptions, say: Callable[[str], None]) -> ParityReport | None:
    """Export a model, and check the files against its own vectors.

    Args:
        say: gets each line for the user, the verdict first.

    Returns:
        The comparison; None if it was not made.

    Raises:
        ExportError: the format cannot express the model (nothing is written then), or the files that were written give
            other vectors.
        UsageError: the output exists, or a value is wrong.
        StorageError: the files cannot be written; nothing is left of them then.
    """
    checkpoint = open_checkpoint(options.model)
    model = _describe(checkpoint, options.instructions, options.dimensions)
    verdict = judge(options.target, traits_of(model))
    for line in verdict.sentences():
        say(line)
    _require_expressible(verdict, options.allow_inexact)
    require_new(options.output)
    file = _write(options, model)
    say(f"{options.model} -> {options.output}")
    report = _check(options, model, say) if options.check else None
    facts = options.facts or CardFacts(options.output.name)
    card = model_card(model, verdict, options.dtype, facts, report, file)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    if report is not None:
        write_json(options.output / "parity.json", report.as_dict())
    if report is not None and not report.passed and verdict.level == "exact":
        raise ExportError(
            f"{options.output} does not give the vectors of {options.model}: {'; '.join(report.faults)}. The files are "
            "kept for a look; do not use them"
        )
    return report


def run_parity(
    model: str,
    target: str,
    *,
    instructions: Mapping[str, str] | None = None,
    dimensions: int | None = None,
    model_name: str = "",
    texts: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare a folder, a file or an endpoint with a model's own vectors.

    Raises:
        UsageError: no runtime here reads it, or the model's vectors are not that long.
        CheckpointError: the model or the target cannot be used.
    """
    encoder = Encoder.load_with(model, LoadOptions(dtype="float32"))
    return check_parity(
        encoder,
        _describe(encoder.checkpoint, instructions or {}, dimensions),
        target,
        model_name=model_name,
        texts=texts,
        say=say,
    )


def _describe(checkpoint: Checkpoint, instructions: Mapping[str, str], dimensions: int | None) -> ExportedModel:
    model = describe_model(checkpoint, instructions, dimensions)
    longest = vector_size(replace(model, dimensions=None))
    if dimensions is not None and not 1 <= dimensions <= longest:
        raise UsageError(f"--dimensions {dimensions}: this model's vectors have 1 to {longest} numbers")
    return model


def failing_rows(report: ParityReport) -> Sequence[str]:
    """Name the runtimes and uses of a report that miss their gate."""
    return [f"{row.runtime}, {row.use} {row.batching}" for row in report.rows if not row.passed]


def _require_expressible(verdict: ExportVerdict, allow_inexact: bool) -> None:
    reasons = "; ".join(verdict.reasons)
    if verdict.level == "impossible":
        raise ExportError(f"--to {verdict.target} cannot express this model: {reasons}")
    if verdict.level == "inexact" and not allow_inexact:
        raise ExportError(
            f"--to {verdict.target} would give other vectors: {reasons}. With --allow-inexact it is written, with the "
            "measured loss"
        )


def _write(options: ExportOptions, model: ExportedModel) -> str:
    """Write the files; return the name of the main one."""
    if options.target == "hub":
        write_hub_folder(options.output, model, options.dtype)
        return "model.safetensors"
    if options.target == "gguf":
        from unmask.export.gguf_file import write_gguf_folder

        return write_gguf_folder(options.output, model, options.dtype)
    try:
        from unmask.export.onnx_file import write_onnx_folder
    except ImportError as error:
        raise MissingPackages("--to onnx needs", "export") from error

    return write_onnx_folder(options.output, model, options.dtype)


def _check(options: ExportOptions, model: ExportedModel, say: Callable[[str], None]) -> ParityReport:
    encoder = Encoder.load_with(options.model, LoadOptions(dtype="float32"))
    try:
        return check_parity(encoder, model, str(options.output), texts=options.texts, say=say)
    except BaseException:
        shutil.rmtree(options.output, ignore_errors=True)
        raise
