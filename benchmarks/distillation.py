"""Measure each choice of a distillation: one command, one table, one plot.

    python benchmarks/distillation.py recipes/smollm2/embed-6l.toml --train DATA/train --output ablation \\
        --set distillation.teachers.mpnet.model=st:MODELS/all-mpnet-base-v2 \\
        --set distillation.teachers.nomic.model=st:MODELS/nomic-embed-text-v1.5

Every variation changes one choice of the recipe and trains for the same arithmetic, from the same data in the same
order. It is judged by held-out texts (cosine to their targets) and by dev sets, never by a test suite. Finished
variations are not trained again; --only and --seeds choose. The data is read once, the teachers' vectors are cached.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from unmask.cli.train import training_progress
from unmask.disk import atomic_write
from unmask.errors import UnmaskError, UsageError
from unmask.training.dev import HELD_OUT_COSINE
from unmask.training.recipe import Recipe
from unmask.training.recipe_file import read_recipe
from unmask.training.run_folder import RunFolder
from unmask.training.train import load_data, run_training


@dataclass(frozen=True)
class Variation:
    """One change of the recipe.

    Attributes:
        name: row of the table.
        question: rows of one question stand together.
        overrides: as for `unmask train --set`.
        arithmetic: arithmetic of a step, relative to the recipe's; a costlier step is made less often.
    """

    name: str
    question: str
    overrides: tuple[str, ...] = ()
    arithmetic: float = field(default=1.0)


def variations(sheared: Path | None) -> tuple[Variation, ...]:
    """All variations.

    Args:
        sheared: folder of the decoder with the recipe's layers, for LoRA; None leaves that row out.
    """
    rows = (
        Variation("as in the recipe", "recipe"),
        Variation(
            "similarities alone", "loss", ("distillation.vector_weight=0.0", "distillation.similarity_weight=10.0")
        ),
        Variation("vectors alone", "loss", ("distillation.weight=0.0",)),
        Variation("learning rate 3e-4", "learning rate", ("optimiser.lr=3e-4",)),
        Variation("learning rate 1.6e-3", "learning rate", ("optimiser.lr=1.6e-3",)),
        Variation(
            "Muon",
            "optimiser",
            ('optimiser.method="muon"', "optimiser.lr=5e-4", "head.lr=5e-4", "optimiser.iterations=3"),
            1.5,
        ),
        Variation("batch 64", "batch", ("batch.size=64",), 0.5),
        Variation("batch 256", "batch", ("batch.size=256", "batch.graph_tokens=40000"), 2.0),
        Variation("one set a batch", "batch", ("batch.sets=1",)),
        Variation("4 layers", "depth", ("layers=4", "exits=[]"), 4 / 6),
        Variation("8 layers", "depth", ("layers=8",), 8 / 6),
        Variation("12 layers", "depth", ("layers=12",), 12 / 6),
        Variation("no exit", "depth", ("exits=[]",)),
        Variation("head not trained", "head", ("head.trained=false",)),
        Variation("head not fitted", "head", ("head.ridge=0",)),
        Variation("embeddings trained", "weights", ("freeze_embedding=false",)),
        Variation("causal mask", "weights", ("causal=true",)),
        Variation("mpnet alone", "teacher", ("distillation.teachers.nomic.weight=1e-6",)),
        Variation("nomic alone", "teacher", ("distillation.teachers.mpnet.weight=1e-6",)),
    )
    if sheared is None:
        return rows
    lora = (
        f"base={json.dumps(str(sheared))}", "layers=false", "exits=[]", "lora={rank=32, alpha=64.0, dropout=0.0}",
        "optimiser.lr=1e-3",
    )  # fmt: skip
    return (*rows, Variation("LoRA of rank 32", "weights", lora))


def train(options: argparse.Namespace, console: Console) -> dict[str, dict[int, dict[str, Any]]]:
    """Train what is missing. Returns the scores of each variation by name and seed."""
    chosen = [v for v in variations(options.sheared) if not options.only or v.name in options.only]
    unknown = sorted(set(options.only) - {v.name for v in chosen})
    if unknown:
        raise UsageError(f"--only {unknown[0]!r}: the variations are {', '.join(v.name for v in variations(Path()))}")
    results: dict[str, dict[int, dict[str, Any]]] = {}
    loaded = None  # with the recipe's own seed: all runs have the same texts, in another order for another seed
    for seed in options.seeds:
        for variation in chosen:
            folder = options.output / "runs" / variation.name.replace(" ", "-") / f"seed-{seed}"
            steps = max(1, round(options.steps / variation.arithmetic))
            overrides = [f"seed={seed}", f"steps={steps}", f"evaluate_every={steps}", f"checkpoint_every={steps}"]
            overrides += ["optimiser.schedule=wsd", "optimiser.decay_share=0.4", f"optimiser.warmup={steps // 10}"]
            recipe = _recipe(options, [*overrides, *options.set, *variation.overrides])
            if not _scores(folder):
                if loaded is None:
                    loaded = load_data(_recipe(options, options.set), options.train, console.print)
                console.print(f"{variation.name}, seed {seed}: {steps} steps")
                with training_progress() as progress:
                    resume = (folder / "run.json").is_file()
                    run_training(
                        recipe, data=options.train, output=folder, resume=resume, loaded=loaded, progress=progress
                    )
                for checkpoint in (folder / "checkpoints").glob("step-*/state.pt"):
                    checkpoint.unlink()  # a few hundred megabytes each
            results.setdefault(variation.name, {})[seed] = _scores(folder)
    return results


def _recipe(options: argparse.Namespace, overrides: list[str]) -> Recipe:
    """Read the recipe with the command's overrides and those of a variation, and with its share of the texts."""
    recipe = read_recipe(options.recipe, overrides)
    if options.share is None:
        return recipe
    sets = [
        msgspec.structs.replace(source, share=options.share)
        if source.limit is None
        else msgspec.structs.replace(source, limit=max(1, round(source.limit * options.share)))
        for source in recipe.data
    ]
    return msgspec.structs.replace(recipe, data=sets)


def _scores(folder: Path) -> dict[str, Any]:
    """Scores at the end of a run, with its tokens and seconds; empty if it has not ended."""
    lines = RunFolder(folder, 1).metrics() if (folder / "run.json").is_file() else []
    scores = next((line["scores"] for line in reversed(lines) if "scores" in line), None)
    if scores is None:
        return {}
    steps = [line for line in lines if "tokens" in line]
    return {
        **scores,
        "tokens": sum(line["tokens"] for line in steps),
        "seconds": round(sum(line["seconds"] for line in steps)),
    }


def write(output: Path, results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """`distillation.json`, `distillation.md`, `distillation.svg` and `.png`."""
    with atomic_write(output / "distillation.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    questions = {v.name: v.question for v in variations(Path())}
    graded = [name for name in _mean(results[next(iter(results))]) if name.endswith("dev")]
    columns = [HELD_OUT_COSINE, *graded]
    lines = [
        "| question | variation | tokens | " + " | ".join(columns) + " | mean of held-out retrieval |",
        "|---|---|---:|" + "---:|" * (len(columns) + 1),
    ]
    for name, seeds in results.items():
        mean = _mean(seeds)
        # A run without the loss on vectors has no vectors to compare with their targets.
        cells = [f"{mean[column]:.1f}" if column in mean else "" for column in columns]
        retrieval = [value for key, value in mean.items() if key not in (*columns, "tokens", "seconds")]
        cells.append(f"{sum(retrieval) / len(retrieval):.1f}" if retrieval else "")
        lines.append(f"| {questions[name]} | {name} | {mean['tokens'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, results[next(iter(results))]))
    lines += [
        "",
        f"Means over the seeds {seeds}, 0-100. Each row has the arithmetic of the first. The cosine is to the row's",
        "own target, so it does not compare rows of other teachers.",
    ]
    with atomic_write(output / "distillation.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(output, results)


def _mean(seeds: dict[int, dict[str, Any]]) -> dict[str, float]:
    runs = list(seeds.values())
    return {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}


def _draw(output: Path, results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """One mark per seed, one line per variation; the recipe itself as a vertical line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "unmask"}
    )
    names = [name for name, seeds in results.items() if HELD_OUT_COSINE in _mean(seeds)][::-1]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        values = [run[HELD_OUT_COSINE] for run in results[name].values()]
        axes.plot(values, [place] * len(values), "o", color="#4c78a8", markersize=5)
    own = results.get("as in the recipe")
    if own:
        axes.axvline(_mean(own)[HELD_OUT_COSINE], color="#9aa0a6", linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("mean cosine of held-out texts to their targets, x 100; one mark per seed")
    axes.set_title("What each choice of the distillation is worth", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    figure.savefig(output / "distillation.svg", metadata={"Date": None})
    figure.savefig(output / "distillation.png", dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="folder of training data")
    parser.add_argument("--steps", type=int, default=100, help="steps of the recipe itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--share", type=float, metavar="SHARE", help="share of each set's texts that all runs have")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="train only this variation")
    parser.add_argument("--sheared", type=Path, help="the decoder with the recipe's layers (unmask shear), for LoRA")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every variation")
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    options = parser.parse_args()
    console = Console(stderr=True)
    try:
        results = train(options, console)
    except UnmaskError as error:
        console.print(f"distillation: {error}")
        sys.exit(1)
    write(options.output, results)
    print((options.output / "distillation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
