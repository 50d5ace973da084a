"""Measure the gain of each step of LLM2Vec on this machine: one command, one table, one plot.

    python benchmarks/ablation.py --train DATA/train --eval DATA/eval --output ablation

trains the three adapters (recipes/smollm2: mntp, simcse on top of it, ablation-supervised on top of it), about 15
minutes each on two cores, and measures five models with `unmask evaluate`: the decoder with its causal mask (uni),
without it (bi), and bi with each of the steps. What is trained and what is measured already is not done again. Finished
adapters can be given instead: --adapter mntp=FOLDER --adapter simcse=FOLDER --adapter supervised=FOLDER, each but the
first trained on top of mntp.

A gain and a loss are reported alike: each row stands with its difference from the row that it builds on.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from rich.console import Console

from unmask.cli.train import training_progress
from unmask.disk import atomic_write
from unmask.errors import UnmaskError, UsageError
from unmask.evaluate.results import ModelResult, Results
from unmask.evaluate.run import Evaluation, run_evaluation
from unmask.training.recipe_file import read_recipe
from unmask.training.train import run_training

RECIPES = Path(__file__).parent.parent / "recipes" / "smollm2"
WORDS = "WordLevel"


@dataclass(frozen=True)
class Row:
    """One model of the ablation.

    Attributes:
        name: as the table calls it.
        steps: adapters, in merging order.
        over: the row that it is compared with.
        causal: the decoder's own mask is left in place.
    """

    name: str
    steps: tuple[str, ...] = ()
    over: str | None = None
    causal: bool = False


ROWS = (
    Row("uni", causal=True),
    Row("bi", over="uni"),
    Row("bi+MNTP", ("mntp",), over="bi"),
    Row("bi+MNTP+SimCSE", ("mntp", "simcse"), over="bi+MNTP"),
    Row("bi+MNTP+supervised", ("mntp", "supervised"), over="bi+MNTP"),
)
STEP_RECIPES = {"mntp": "mntp.toml", "simcse": "simcse.toml", "supervised": "ablation-supervised.toml"}


def adapters_of(options: argparse.Namespace, console: Console) -> dict[str, Path]:
    """Return the adapter of each step: named on the command line, trained before, or trained now."""
    named_adapters = dict(text.partition("=")[::2] for text in options.adapter)
    unknown = [step for step in named_adapters if step not in STEP_RECIPES]
    if unknown:
        raise UsageError(f"--adapter {unknown[0]}=...: the steps are {', '.join(STEP_RECIPES)}")
    adapters: dict[str, Path] = {}
    for step, recipe in STEP_RECIPES.items():
        run = options.output / "runs" / step
        if step in named_adapters:
            adapters[step] = Path(named_adapters[step])
        elif (run / "adapter" / "adapter_config.json").is_file():
            console.print(f"{step}: trained already, {run / 'adapter'}")
            adapters[step] = run / "adapter"
        else:
            adapters[step] = trained(step, options.recipes / recipe, run, adapters, options, console)
    return adapters


def trained(
    step: str, recipe: Path, run: Path, below: Mapping[str, Path], options: argparse.Namespace, console: Console
) -> Path:
    """Train one step, or continue it."""
    if options.train is None:
        raise UsageError(f"{step} has to be trained: --train DATA/train, or --adapter {step}=FOLDER")
    overrides = [f"base={json.dumps(options.model)}"]
    if step != "mntp":
        overrides.append(f"adapters={json.dumps([str(below['mntp'].absolute())])}")
    chosen = read_recipe(recipe, [*overrides, *options.set])
    console.print(f"{step}: training")
    with training_progress() as progress:
        run_training(
            chosen,
            data=options.train,
            output=run,
            resume=(run / "run.json").is_file(),
            progress=progress,
            log=console.print,
        )
    return run / "adapter"


def specification(row: Row, model: str, adapters: Mapping[str, Path]) -> str:
    """Write a row as a model specification of `unmask evaluate`."""
    fields = [("name", row.name), *(("adapter", str(adapters[step])) for step in row.steps)]
    return f"{model}?{urlencode(fields)}" + ("&causal" if row.causal else "")


def means_of(model: ModelResult) -> dict[str, float | None]:
    """Return the mean of each category, and that of the categories of whole texts, without the word level."""
    categories = list(dict.fromkeys(score.category for score in model.scores))
    means: dict[str, float | None] = {}
    for category in categories:
        scores = [score.score for score in model.scores if score.category == category]
        values = [score for score in scores if score is not None]
        means[category] = sum(values) / len(values) if len(values) == len(scores) else None  # a failed task has no mean
    texts = [value for category, value in means.items() if category != WORDS]
    whole = [value for value in texts if value is not None]
    means["texts"] = sum(whole) / len(whole) if whole and len(whole) == len(texts) else None
    return means


def write_table(folder: Path, results: Results, rows: Sequence[Row]) -> None:
    """`ablation.json` and `ablation.md`."""
    means = {model.name: means_of(model) for model in results.models}
    tasks = [(score.task, score.category) for score in results.models[0].scores]
    scores = {model.name: {score.task: score.score for score in model.scores} for model in results.models}
    columns = list(means[rows[0].name])
    lines = ["# What each step is worth", ""]
    lines += ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        before = means[row.over] if row.over else {}
        cells = [_cell(means[row.name][column], before.get(column)) for column in columns]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Means of the tasks of a kind, 0-100; `texts` is the mean of the kinds without the word-level tasks. In",
        "brackets the difference from the row that it builds on: bi from uni, MNTP from bi, the last two from MNTP.",
        "",
        "| task | kind | " + " | ".join(row.name for row in rows) + " |",
        "|---|---|" + "---:|" * len(rows),
    ]
    for task, category in tasks:
        cells = [_cell(scores[row.name].get(task), None) for row in rows]
        lines.append(f"| {task} | {category} | " + " | ".join(cells) + " |")
    made = results.provenance
    lines += [
        "",
        f"Measured {made.started}, {made.machine}, {made.seconds / 60:.0f} minutes. Intervals: evaluation/report.html.",
        "",
    ]
    with atomic_write(folder / "ablation.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    content = {
        "rows": [
            {
                "name": row.name,
                "steps": row.steps,
                "over": row.over,
                "means": means[row.name],
                "scores": scores[row.name],
            }
            for row in rows
        ],
        "provenance": {"started": made.started, "machine": made.machine, "versions": made.versions, "data": made.data},
    }
    with atomic_write(folder / "ablation.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cell(value: float | None, before: float | None) -> str:
    if value is None:
        return "failed"
    return f"{value:.1f}" + (f" ({value - before:+.1f})" if before is not None else "")


def draw(folder: Path, results: Results, rows: Sequence[Row]) -> None:
    """`ablation.svg` and `.png`: one line of marks for each kind of task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "unmask"}
    )
    means = {model.name: means_of(model) for model in results.models}
    kinds = list(means[rows[0].name])[::-1]
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.45 * len(kinds)), layout="constrained")
    colours = ("#9aa0a6", "#4c78a8", "#59a14f", "#f28e2b", "#b4322f")
    for row, colour, marker in zip(rows, colours, "osD^P", strict=True):
        points = [(value, place) for place, kind in enumerate(kinds) if (value := means[row.name][kind]) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=row.name)
    for place, kind in enumerate(kinds):
        values = [value for row in rows if (value := means[row.name][kind]) is not None]
        if values:
            axes.plot([min(values), max(values)], [place, place], color="#d0d4d9", linewidth=1.5, zorder=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(-0.6, len(kinds) - 0.4)
    axes.set_xlabel("mean score of the kind, 0-100")
    axes.set_title("What each step is worth", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    figure.legend(frameon=False, fontsize=8, ncols=len(rows), loc="outside lower center")
    figure.savefig(folder / "ablation.svg", metadata={"Date": None})
    figure.savefig(folder / "ablation.png", dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unmask/smollm2-135m", help="the decoder")
    parser.add_argument("--train", type=Path, help="folder of training data")
    parser.add_argument("--eval", type=Path, help="folder of evaluation data")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder with the three recipes")
    parser.add_argument("--adapter", action="append", default=[], metavar="STEP=FOLDER", help="a finished adapter")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in each recipe")
    parser.add_argument("--suite", action="append", default=[], help="left out, with no --task: local")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    options = parser.parse_args()
    console = Console(stderr=True)
    try:
        adapters = adapters_of(options, console)
        results = run_evaluation(
            Evaluation(
                models=[specification(row, options.model, adapters) for row in ROWS],
                suites=options.suite or ([] if options.task else ["local"]),
                tasks=options.task,
                data=options.eval,
                output=options.output / "evaluation",
                command=" ".join(["python", *sys.argv]),
            )
        )
    except UnmaskError as error:
        console.print(f"ablation: {error}")
        sys.exit(1)
    write_table(options.output, results, ROWS)
    draw(options.output, results, ROWS)
    print((options.output / "ablation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
