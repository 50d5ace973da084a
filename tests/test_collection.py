"""Test ids: the same in every process, short and readable."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import SLOW

REPOSITORY = Path(__file__).parent.parent


def collection(hash_seed: str) -> subprocess.Popen[str]:
    """Start collecting every test of the suite in a process of its own."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, "tests"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_collections_give_the_same_short_ids() -> None:
    first = collection("1")
    time.sleep(1.1)  # another second of the clock, since a gzip header holds it
    second = collection("2")
    lists = [
        [line for line in process.communicate()[0].splitlines() if line.startswith("tests/")]
        for process in (first, second)
    ]
    assert first.returncode == second.returncode == 0
    assert len(lists[0]) > 1000
    assert lists[0] == lists[1]
    assert not [name for name in lists[0] if len(name) > 200 or not name.isascii() or not name.isprintable()]


def test_slow_modules_exist() -> None:
    missing = [name for name in SLOW if not (REPOSITORY / "tests" / name).is_file()]
    assert not missing, f"tests/conftest.py lists modules as slow that are not there: {missing}"
