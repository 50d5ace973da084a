"""`tools/parity.py`: rows of a real comparison become results, the table of a page, and measurements."""

import json
import shutil
from pathlib import Path

from parity import measure, measurements, runtime_name, write

from tests.export.tiny import FEW
from unmask.checkpoint import DEFAULT_MODEL

REPOSITORY = Path(__file__).parents[2]


def test_rows_replace_those_of_the_same_runtime(golden_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("figures.py", "export.md"):
        shutil.copy(REPOSITORY / "docs" / name, tmp_path / "docs" / name)
    rows = measure(str(golden_dir / "tiny_llama"), ["onnxruntime"], FEW)
    assert [(row["model"], row["precision"], row["texts"]) for row in rows] == [
        ("tiny_llama", "float32", len(FEW)),
        ("tiny_llama", "q8", len(FEW)),
    ]
    assert all(set(row["worst"]) == {"texts", "documents", "queries"} for row in rows)
    assert min(rows[0]["worst"].values()) >= 0.999999 > min(rows[1]["worst"].values()) >= 0.995
    write(rows, tmp_path)
    write([{**rows[0], "runtime": "ONNX Runtime 99.0"}], tmp_path)
    results = json.loads((tmp_path / "docs" / "parity" / "results.json").read_text())["rows"]
    assert [(row["runtime"], row["precision"]) for row in results] == [
        ("ONNX Runtime 99.0", "float32"),
        (rows[1]["runtime"], "q8"),
    ]
    page = (tmp_path / "docs" / "export.md").read_text()
    assert f"| ONNX Runtime 99.0 | float32 | 1 | tiny_llama | {len(FEW)} | {rows[0]['mean']:.7f} |" in page
    mean, worst = measurements([{**rows[1], "model": DEFAULT_MODEL}])
    assert (mean.value, worst.value) == (round(rows[1]["mean"], 8), round(min(rows[1]["worst"].values()), 8))
    assert (worst.what, worst.note) == ("worst cosine in ONNX Runtime, q8", f"{rows[1]['runtime']}.")


def test_names_of_runtimes_have_no_version() -> None:
    names = ["ONNX Runtime 1.32.0", "transformers.js 4.3.1", "llama.cpp (xllamacpp 2026.10)"]
    assert [runtime_name(name) for name in names] == ["ONNX Runtime", "transformers.js", "llama.cpp"]
