"""Fill figures into the pages, from the committed evaluation of the default model and from docs/parity/results.json.

`python docs/figures.py` rewrites every block `<!-- figures: NAME -->...<!-- /figures -->` of the pages in PAGES.
A test compares the blocks with what this module computes, so a new evaluation cannot leave an old figure behind.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from unmask.checkpoint import DEFAULT_MODEL
from unmask.evaluate.report.report_model import ModelSummary, ReportModel, build_report_model
from unmask.evaluate.results import Category, read_results

ROOT = Path(__file__).parent.parent
EVALUATION = ROOT / "docs" / "evaluation"
PARITY = ROOT / "docs" / "parity" / "results.json"
PAGES = ("README.md", "docs/evaluation.md", "docs/export.md", "docs/performance.md")
SINGLE_TASKS = {"STSBenchmark": "STSBenchmark", "Banking77Classification": "Banking77"}

_BLOCK = re.compile(r"(<!-- figures: (?P<name>[a-z-]+) -->)(?P<text>.*?)(<!-- /figures -->)", re.DOTALL)


@cache
def report() -> ReportModel:
    """Compute the report of the committed evaluation.

    Raises:
        ValueError: it is about another model than the default one.
    """
    results = read_results(EVALUATION)
    if results.models[0].name != DEFAULT_MODEL:
        raise ValueError(f"docs/evaluation is about {results.models[0].name}, and the default model is {DEFAULT_MODEL}")
    return build_report_model(EVALUATION, results)


def references() -> list[ModelSummary]:
    """Return the models of other makers; the rest are ours, or one of ours in another length or precision."""
    return [row for row in report().rows if row.model.kind != "unmask"]


def means() -> str:
    """Return the default model's mean and those of the references: `67.8; all-MiniLM-L6-v2 has 70.4`."""
    own, others = report().rows[0], references()
    return f"{own.mean:.1f}; " + ", ".join(f"{row.short_name} has {row.mean:.1f}" for row in others)


def verdicts() -> str:
    """Return the result of the comparison with each reference, and the means."""
    own, others = report().rows[0], references()
    words = {"better": "better than", "worse": "**worse** than", "noise": "no clear difference from"}
    parts = [f"{words[row.difference.verdict]} {row.short_name} ({row.mean:.1f})" for row in others if row.difference]
    return f"mean {own.mean:.1f}: " + ", ".join(parts)


def table() -> str:
    """Return the rows of all models: mean, means by kind, single tasks, and the difference with its interval."""
    kinds: list[Category] = [k for k, count in report().counts.items() if count and k != "WordLevel"]
    heads = [f"mean of {len(report().common)} tasks", *(f"{kind} ({report().counts[kind]})" for kind in kinds)]
    heads += SINGLE_TASKS.values()
    heads.append(f"{report().rows[0].short_name} minus it")
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|---|"]
    for row in report().rows:
        scores = {score.task: score.score for score in row.model.scores}
        figures = [row.mean, *(row.means[kind] for kind in kinds), *(scores[task] for task in SINGLE_TASKS)]
        cells = " | ".join("" if figure is None else f"{figure:.1f}" for figure in figures)
        lines.append(f"| {row.model.name} | {cells} | {_difference(row)} |".replace("|  |", "| |"))
    return "\n\n" + "\n".join(lines) + "\n\n"


def _difference(row: ModelSummary) -> str:
    """Return our mean minus another model's, as in the report: `-1.8 (-2.9 to -0.7; worse)`."""
    if row.difference is None:
        return ""
    low, high = row.difference.interval
    verdict = {"noise": "within noise"}.get(row.difference.verdict, row.difference.verdict)
    return f"{row.difference.delta:+.1f} ({low:+.1f} to {high:+.1f}; {verdict})"


def parity() -> str:
    """Return the table of parity: for each runtime and precision the model with the worst cosine."""
    rows = json.loads(PARITY.read_text(encoding="utf-8"))["rows"] if PARITY.is_file() else []
    if not rows:
        return "\n\nNo row yet: run `make parity`.\n\n"
    lines = [
        "| runtime | weights | models | worst of them | texts | mean | worst | difference, all models | measured |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["runtime"], row["precision"]), []).append(row)
    for (runtime, precision), group in sorted(groups.items(), key=lambda item: (item[0][0].lower(), item[0][1])):
        worst = min(group, key=lambda row: (min(row["worst"].values()), -row["difference"]))
        cells = [runtime, precision, str(len(group)), worst["model"], str(worst["texts"]), f"{worst['mean']:.7f}"]
        largest = max(row["difference"] for row in group)
        cells += [f"{min(worst['worst'].values()):.7f}", f"{largest:.1e}", worst["on"]]
        lines.append(f"| {' | '.join(cells)} |")
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    return "\n\n" + "\n".join(lines) + f"\n\nMeasured on {machines}.\n\n"


BLOCKS: dict[str, Callable[[], str]] = {"means": means, "verdicts": verdicts, "table": table, "parity": parity}


def fill(text: str) -> str:
    """Return a page with today's figures in its blocks."""
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block['name']]()}{block[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(fill((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")
