"""Memory of a model, measured in a process of its own."""

import subprocess
from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.evaluate.memory import MemoryUnknown, measure_memory, peak_resident_bytes

TEXTS = ["a text", "and another one"]


def test_the_whole_process_is_counted_and_nothing_of_this_one() -> None:
    ballast = bytearray(b"x") * 400_000_000
    peak = measure_memory("wordllama:default", {}, TEXTS)
    own = peak_resident_bytes()
    assert peak is not None and own is not None
    weights = 32_000 * 256 * 4
    assert weights < peak < len(ballast) < own


def test_an_endpoint_has_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started for an endpoint")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert measure_memory("http://127.0.0.1:9/v1#model", {}, TEXTS) is None


def test_nothing_is_measured_where_the_system_keeps_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.evaluate.memory.peak_resident_bytes", lambda: None)
    assert measure_memory("wordllama:default", {}, TEXTS) is None


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(MemoryUnknown, match=str(tmp_path)):
        measure_memory(str(tmp_path), {"dtype": "float32"}, TEXTS)
    with pytest.raises(UsageError, match="no option 'colour'"):
        measure_memory("wordllama:default?colour=red", {}, TEXTS)


def test_a_process_that_was_killed_leaves_the_memory_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: killed)
    with pytest.raises(MemoryUnknown, match="ended with code -9"):
        measure_memory("wordllama:default", {}, TEXTS)
