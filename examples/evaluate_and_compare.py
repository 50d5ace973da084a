"""Measure two models on the same tasks, and test whether the difference is more than noise.

Here the second model is the first with its vectors truncated to 128 dimensions. DATA is a folder of evaluation data.
Run it with: python examples/evaluate_and_compare.py DATA RESULTS [TASK ...]
"""

import subprocess
import sys

data, results, *tasks = sys.argv[1:]
tasks = tasks or ["STSBenchmark", "Banking77Classification"]


def unmask(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "unmask", *arguments], check=True)


unmask(
    "evaluate",
    "unmask/smollm2-135m-embed",
    *("--baseline", "unmask/smollm2-135m-embed?dimensions=128&name=short"),
    *(word for task in tasks for word in ("--task", task)),
    *("--data", data, "--output", results),
)
unmask("compare", results, f"{results}:short")
print(f"The report is {results}/report.html")
