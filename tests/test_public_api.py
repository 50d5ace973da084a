"""Public API: exported names, and a command line that starts without loading the model libraries."""

import gc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import unmask
from unmask.exports import lazy_exports

HEAVY = ("torch", "numpy", "transformers", "starlette", "pyarrow", "mteb", "sqlalchemy", "scipy", "httpx", "asyncio")

HELP = """
import contextlib, sys
from unmask.cli import main

with contextlib.suppress(SystemExit):
    main(["--help"])
print(*sys.modules)
"""


def test_exports() -> None:
    assert set(unmask.__all__) == {"Encoder", "Recipe", "UnmaskError", "__version__", "errors", "evaluate", "train"}
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None
    assert callable(unmask.train) and callable(unmask.evaluate) and unmask.errors.UnmaskError is unmask.UnmaskError


def test_evaluate_is_a_function_and_a_package() -> None:
    suites = import_module("unmask.evaluate.suites")
    with pytest.raises(unmask.errors.UsageError):
        unmask.evaluate("no model", output="nowhere", suites=["no suite"])
    assert import_module("unmask.evaluate").suites is suites


def test_import_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, unmask; unmask.train; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [name for name in HEAVY if name in done.stdout.split()]


def test_garbage_is_not_searched_for_during_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "imported_late"
    package.mkdir()
    (package / "sound.py").write_text("import gc\nis_searched = gc.isenabled()\n")
    (package / "broken.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_name = lazy_exports("imported_late", {"sound": ("is_searched",), "broken": ("nothing",)})
    assert not import_name("is_searched") and gc.isenabled()
    with pytest.raises(ImportError):
        import_name("nothing")
    assert gc.isenabled()
    gc.disable()
    try:
        assert not import_name("is_searched") and not gc.isenabled()
    finally:
        gc.enable()


def test_help_imports_nothing_heavy() -> None:
    """Start-up time is the number of modules; the seconds that they take are those of the machine."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert "encode" in done.stdout
    modules = done.stdout.splitlines()[-1].split()
    assert not [name for name in HEAVY if name in modules]
    assert len(modules) < 500
