"""`unmask export` and `unmask parity`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from unmask.cli.options import AsJson
from unmask.errors import UsageError
from unmask.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from unmask.catalogue import Record
    from unmask.export import ParityReport

# Languages of the catalogue's records, as the hub spells them.
_LANGUAGES = {"English": "en"}

_Instruction = Annotated[
    tuple[str, ...],
    Parameter(
        name="--instruction",
        metavar="NAME=TEXT",
        help="Instruction by name, such as query=... or document=...; repeat it for several. Default: the model's own.",
    ),
]


def export(
    model: str,
    /,
    *,
    to: Literal["hub", "onnx", "gguf"],
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    dtype: Literal["float32", "float16", "bfloat16", "q8"] = "float32",
    instruction: _Instruction = (),
    dimensions: int | None = None,
    allow_inexact: bool = False,
    no_check: bool = False,
) -> int:
    """Write a model for other runtimes, with proof of its vectors.

    The verdict is printed first: exact, inexact, or impossible with the reason; nothing is written for the last. Then
    each runtime that is installed here reads the files, and its vectors are compared with this model's own: the table
    is in README.md and parity.json of the output. Exit code 1: the vectors are not the same.

    Parameters
    ----------
    model
        Shipped id, hub id, folder or .gguf file.
    to
        Format. hub: one folder for sentence-transformers, vLLM, TEI and transformers. onnx: ONNX Runtime, fastembed,
        transformers.js. gguf: llama.cpp, Ollama, LM Studio.
    output
        New folder.
    dtype
        Precision of the weights in the files; q8 (8 bits) for onnx and gguf, bfloat16 for hub.
    dimensions
        Matryoshka length to cut vectors to.
    allow_inexact
        Write files too that cannot give the model's own vectors, with the measured loss.
    no_check
        Do not compare vectors.
    """
    from pathlib import Path

    from unmask.export import CardFacts, ExportOptions, run_export

    record = _record(model)
    licence = record.licence if record is not None else None
    names = record.languages if record is not None else ()
    languages = [_LANGUAGES[name] for name in names if name in _LANGUAGES]
    facts = CardFacts(Path(output).name, licence or "", languages)
    report = run_export(
        ExportOptions(
            model=model,
            target=to,
            output=Path(output),
            dtype=dtype,
            instructions=_instructions(instruction, record),
            dimensions=dimensions,
            allow_inexact=allow_inexact,
            check=not no_check,
            facts=facts,
        ),
        say,
    )
    if report is not None:
        _print_report(report)
    return 0


def parity(
    model: str,
    target: str,
    /,
    *,
    name: Annotated[str, Parameter(name="--model", help="Model to ask an endpoint for.")] = "",
    instruction: _Instruction = (),
    dimensions: int | None = None,
    texts: str = "",
    as_json: AsJson = False,
) -> int:
    """Compare vectors elsewhere with a model's own.

    Names what is wrong with those of a folder, a file or an endpoint. Exit code 1: a runtime's vectors are outside its
    gate.

    Parameters
    ----------
    model
        Model as unmask loads it.
    target
        Folder (sentence-transformers, ONNX or GGUF files in it), .onnx or .gguf file, or base URL of an
        OpenAI-compatible server.
    dimensions
        Matryoshka length that the target was cut to.
    texts
        File with a text per line, to compare with instead of those that ship.
    """
    from pathlib import Path

    from unmask.export import run_parity

    instructions = _instructions(instruction, _record(model))
    report = run_parity(
        model,
        target,
        instructions=instructions,
        dimensions=dimensions,
        model_name=name,
        texts=Path(texts).read_text(encoding="utf-8-sig").splitlines() if texts else (),
        say=say,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)
    return 0 if report.passed else 1


def _record(model: str) -> "Record | None":
    from unmask.catalogue import Catalogue

    entry = Catalogue.shipped().get(model)
    return None if entry is None else entry.record


def _instructions(options: Sequence[str], record: "Record | None") -> dict[str, str]:
    """Instructions by name: those of the catalogue's record, replaced by the options.

    Raises:
        UsageError: an option is not NAME=TEXT.
    """
    instructions = {}
    if record is not None:
        own = {"query": record.query_instruction, "document": record.document_instruction}
        instructions = {name: text for name, text in own.items() if text}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--instruction {option[:40]!r}: write NAME=TEXT, such as query='Find passages:'")
        instructions[name] = text
    return instructions


def _print_report(report: "ParityReport") -> None:
    headings = ("runtime", "precision", "texts", "batching", "number", "mean", "worst", "difference", "verdict")
    rows = [
        (
            row.runtime,
            row.dtype,
            row.use,
            row.batching,
            row.count,
            f"{row.mean:.7f}",
            f"{row.worst:.7f}",
            f"{row.difference:.1e}",
            "not judged" if row.gate is None else "same" if row.passed else "other",
        )
        for row in report.rows
    ]
    print_table(headings, rows, right=("number", "mean", "worst", "difference"))
    for note in report.notes:
        say(note)
    for fault in report.faults:
        say(fault)
