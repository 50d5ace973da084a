"""Measurements are added, never changed, and ours carry everything that it takes to check them."""

from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest

from unmask.catalogue import Measurement, append_measurements
from unmask.catalogue.figures import figures
from unmask.catalogue.measurement import LOCAL, PARITY, parity_quantity, read_measurements
from unmask.errors import UsageError


def measured(value: float = 1.0, **changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "model": "a/b", "group": LOCAL, "what": "STS12", "category": "STS", "value": value, "unit": "score",
        "origin": "measured", "by": "us", "on": date(2026, 1, 1), "revision": "r", "hardware": "h", "command": "c",
        "raw": "f",
    }  # fmt: skip
    return Measurement(**fields | changes)


@pytest.mark.parametrize("field", ["on", "revision", "hardware", "command", "raw"])
def test_a_value_of_ours_has_its_whole_provenance(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        measured(1.0, **{field: None})
    assert measured(1.0, origin="published", **{field: None}).origin == "published"


def test_a_file_only_grows(tmp_path: Path) -> None:
    file = tmp_path / "new" / "m.jsonl"
    append_measurements(file, [measured(1.0)])
    before = file.read_bytes()
    append_measurements(file, [measured(2.0), measured(3.0, origin="published")])
    assert file.read_bytes().startswith(before)
    measurements = read_measurements(file)
    assert [m.value for m in measurements] == [1.0, 2.0, 3.0]
    # The last value of an origin stands for those before it; the others remain in the file.
    put_together = figures(measurements)
    assert [m.value for m in put_together.suites[LOCAL, "measured"].tasks] == [2.0]
    assert [m.value for m in put_together.suites[LOCAL, "published"].tasks] == [3.0]
    assert put_together.local is None  # thirteen tasks are missing


def test_parity_is_a_mean_and_a_worst_cosine_of_each_runtime_and_precision() -> None:
    def cosine(value: float, runtime: str, precision: str, kind: Literal["mean", "worst"]) -> Measurement:
        what = parity_quantity(runtime, precision, kind)
        return measured(value, group=PARITY, what=what, category=runtime, metric=precision, unit="cosine")

    values = [
        cosine(0.9, "llama.cpp", "q8", "worst"),
        cosine(0.999, "llama.cpp", "q8", "mean"),
        cosine(0.99, "llama.cpp", "q8", "worst"),  # found later
        cosine(1.0, "fastembed", "float32", "mean"),  # alone: no row
    ]
    assert [(p.runtime, p.precision, p.mean.value, p.worst.value) for p in figures(values).parity] == [
        ("llama.cpp", "q8", 0.999, 0.99)
    ]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    append_measurements(file, [measured()])
    file.write_text(file.read_text(encoding="utf-8") + '{"model": "a"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2 of m\.jsonl"):
        read_measurements(file)
