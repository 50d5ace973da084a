"""Test ids: the same in every process, short and readable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SLOW

REPOSITORY = Path(__file__).parent.parent


def test_two_collections_give_the_same_short_ids(request: pytest.FixtureRequest) -> None:
    """Compare this process's collection with one of a process with other hashes.

    Two workers of pytest-xdist are such processes: it runs no test if they have collected different ones.
    """
    here = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/")]
    workers = getattr(request.config, "workerinput", {}).get("workercount", 1)
    if workers < 2 or os.environ.get("PYTHONHASHSEED", "random") != "random":
        assert collected_later(request.config) == here
    assert not [name for name in here if len(name) > 200 or not name.isascii() or not name.isprintable()]


def collected_later(config: pytest.Config) -> list[str]:
    """The ids of the same selection in a new process, with other hashes."""
    selection = ["-m", config.option.markexpr, "-k", config.option.keyword, *config.args]
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *selection],
        cwd=config.invocation_params.dir,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("tests/")]


def test_slow_modules_exist() -> None:
    missing = [name for name in SLOW if not (REPOSITORY / "tests" / name).is_file()]
    assert not missing, f"tests/conftest.py lists modules as slow that are not there: {missing}"
