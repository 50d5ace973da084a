"""torch's library is loaded before torch is imported, and torch then uses that one."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest

from unmask.encoder.torch_library import load_torch_library

SCRIPT = """
import os, sys
from unmask.encoder.torch_library import load_torch_library

def libraries():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "libtorch_cpu" in line}

thread = load_torch_library()
thread.join()
assert "torch" not in sys.modules
before = libraries()
import torch
assert len(before) == 1 and libraries() == before, (before, libraries())
assert torch.ones(3, 5).matmul(torch.ones(5, 2)).eq(5).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc, and other names of libraries")
def test_torch_uses_the_library_that_was_loaded_before_it() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_without_torch_nothing_is_loaded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ModuleSpec("torch", None, is_package=True)
    empty.submodule_search_locations = [str(tmp_path)]
    for spec in (None, empty):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert load_torch_library() is None


def test_a_library_that_cannot_be_loaded_is_left_to_the_import(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    (tmp_path / "lib").mkdir()
    for name in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        (tmp_path / "lib" / name).write_bytes(b"no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    thread = load_torch_library()
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
