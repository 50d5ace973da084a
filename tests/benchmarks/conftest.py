"""The benchmarks' own modules, behind all others: some have the names of packages of tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
