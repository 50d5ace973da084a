"""Measure two models on the same tasks, and test whether the difference is more than noise.

Here the second model is the first with its vectors truncated to 128 dimensions. DATA is a folder of evaluation data.
Run it with: python examples/evaluate_and_compare.py DATA RESULTS [TASK ...]
"""

import subprocess
import sys

import unmask

if len(sys.argv) < 3:
    sys.exit(__doc__)
data, output, *tasks = sys.argv[1:]

results = unmask.evaluate(
    "unmask/smollm2-embed-6l",
    baselines=["unmask/smollm2-embed-6l?dimensions=128&name=short"],
    tasks=tasks or ["STSBenchmark", "Banking77Classification"],
    data=data,
    output=output,
)
for model in results.models:
    print(model.name, {score.task: score.score for score in model.scores})

subprocess.run([sys.executable, "-m", "unmask", "compare", output, f"{output}:short"], check=True)
print(f"The report is {output}/report.html")
