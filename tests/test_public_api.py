"""The door of the package: exported names, and a command line that starts without loading the model libraries."""

import subprocess
import sys

import unmask

HEAVY = ("torch", "numpy", "transformers", "starlette", "pyarrow", "mteb", "sqlalchemy", "scipy", "httpx", "asyncio")

HELP = """
import contextlib, sys
from unmask.cli import main

with contextlib.suppress(SystemExit):
    main(["--help"])
print(*sys.modules)
"""


def test_exports() -> None:
    assert set(unmask.__all__) == {"Encoder", "UnmaskError", "__version__"}
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None


def test_help_imports_nothing_heavy() -> None:
    """Start-up time is the number of modules; the seconds that they take are those of the machine."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert "encode" in done.stdout
    modules = done.stdout.splitlines()[-1].split()
    assert not [name for name in HEAVY if name in modules]
    assert len(modules) < 500
