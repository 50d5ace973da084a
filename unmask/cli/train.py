"""`unmask train`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from unmask.cli.known_models import checks_known_models
from unmask.cli.options import THIS_PROCESS, AsJson
from unmask.cluster.options import ClusterOptions
from unmask.errors import UsageError
from unmask.terminal import Progress, Step, print_json, print_sentence, print_table, say

if TYPE_CHECKING:
    from unmask.training.loop import TrainingProgress
    from unmask.training.plan import RunPlan
    from unmask.training.recipe import Recipe


_CLUSTER = Group.create_ordered("Cluster")


@checks_known_models
def train(
    recipe: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    data: Path | None = None,
    set: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    resume: bool = False,
    dry_run: bool = False,
    cluster: Annotated[ClusterOptions, Parameter(name="*", group=_CLUSTER)] = THIS_PROCESS,
    as_json: AsJson = False,
) -> int:
    """Train an encoder from a decoder, as a recipe says.

    Parameters
    ----------
    recipe
        TOML file. The folder recipes/ has the published ones and ours; docs/reference/recipe.md explains every field.
        With [[stages]] it trains one after the other.
    output
        Folder of the run: checkpoints, metrics, and in the end the adapter or model. A stage has its own folder in it.
    data
        Folder that the recipe's paths start from. Default: the recipe's own folder.
    set
        Override a field, as in --set optimiser.lr=1e-4 or --set data.nli.limit=1000. Repeat it for several.
    resume
        Continue the run in the output folder.
    dry_run
        Read the data and print counts, tokens, memory and time. Train nothing.
    as_json
        Print the estimates of a dry run as JSON, one object per stage.
    """
    from unmask.training.stages import read_stages, train_stages

    recipes = read_stages(recipe, set)
    folder = data or recipe.parent
    if dry_run:
        from unmask.training.plan import plan_run

        plans: list[RunPlan] = []
        for stage in recipes:
            # A stage starts from the vectors of the one before it.
            plans.append(plan_run(stage, folder, say, plans[-1].dimensions if plans else None))
        if as_json:
            print_json([asdict(plan) for plan in plans])
        else:
            for plan in plans:
                _print_plan(plan)
        return 0
    if output is None:
        raise UsageError("--output names the folder of the run; --dry-run needs none")

    def run(stage: "Recipe", target: Path, resumed: bool) -> Path:
        return _train_one(stage, folder, target, resumed, cluster)

    if len(recipes) == 1:
        run(recipes[0], output, resume)
    else:
        train_stages(recipes, output, resume, run)
    return 0


def _train_one(recipe: "Recipe", data: Path, output: Path, resume: bool, cluster: ClusterOptions) -> Path:
    with training_progress() as progress:
        if cluster.cluster is None:
            from unmask.training.train import run_training

            outcome = run_training(recipe, data=data, output=output, resume=resume, progress=progress, log=say)
        else:
            from unmask.cluster.training import train_on_cluster

            folders = {"data": data.absolute(), "output": output.absolute()}
            outcome = train_on_cluster(cluster, recipe, **folders, resume=resume, progress=progress, log=say)
    if outcome.is_main:
        scores = "".join(f", {name} {score:.2f}" for name, score in outcome.scores.items())
        say(f"{recipe.steps} steps -> {outcome.folder}{scores}")
    return outcome.folder


@contextmanager
def training_progress() -> "Iterator[Callable[[TrainingProgress], None]]":
    """Return a function that shows the progress of a run; call it after every step."""
    with Progress() as progress:

        def show(step: "TrainingProgress") -> None:
            scores = tuple(f"{name} {score:.1f}" for name, score in step.scores.items())
            speed = f"{step.tokens_per_second:,.0f} tokens/s"
            progress.show(Step("train", step.step, step.steps, "steps", (f"loss {step.loss:.4f}", speed, *scores)))

        yield show


def _print_plan(plan: "RunPlan") -> None:
    """Print the estimate of a dry run."""
    rows = [
        (
            source.name,
            "streamed" if source.examples is None else f"{source.examples:,}",
            f"{source.held_out:,}",
            f"{source.tokens_per_example:.0f}",
            str(source.examples_per_step),
            f"{source.share:.1%}",
        )
        for source in plan.sources
    ]
    headings = ("data", "examples", "held out", "tokens each", "per step", "share of steps")
    print_table(headings, rows, right=headings[1:])
    hours, minutes = divmod(round(plan.seconds / 60), 60)
    print_sentence(f"{plan.steps:,} steps, about {plan.tokens:,} tokens; {plan.trained:,} parameters are trained")
    print_sentence(
        f"estimated: {hours} h {minutes:02d} min on this machine now, {plan.memory_bytes / 1e9:.1f} GB of memory"
    )
