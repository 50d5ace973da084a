"""Test ids: the same in every process, short and readable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SLOW

REPOSITORY = Path(__file__).parent.parent


def test_two_collections_give_the_same_short_ids(request: pytest.FixtureRequest) -> None:
    """Compare this process's collection with one made later, in a process with other hashes."""
    here = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/")]
    config = request.config
    selection = ["-m", config.option.markexpr, "-k", config.option.keyword, *config.args]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "--quiet",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *selection,
        ],
        cwd=config.invocation_params.dir,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    later = [line for line in done.stdout.splitlines() if line.startswith("tests/")]
    assert later == here
    assert not [name for name in here if len(name) > 200 or not name.isascii() or not name.isprintable()]


def test_slow_modules_exist() -> None:
    missing = [name for name in SLOW if not (REPOSITORY / "tests" / name).is_file()]
    assert not missing, f"tests/conftest.py lists modules as slow that are not there: {missing}"
