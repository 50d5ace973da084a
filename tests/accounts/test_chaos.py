"""The small version of `benchmarks/ledger_chaos.py`: a real server, killed while callers spend."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "ledger_chaos.py"


def test_every_answer_is_charged_exactly_once_and_every_cost_booked_once(url: str, request: pytest.FixtureRequest):
    numbers = ["--requests", "600", "--keys", "12", "--kills", "3"]
    command = [sys.executable, str(SCRIPT), *numbers, "--providers", "--database", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zero drift" in done.stdout and "attempts at providers" in done.stdout
