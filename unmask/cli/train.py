"""`unmask train`, and what goes before and after it: mining and merging."""

from typing import Annotated

from cyclopts import Parameter

from unmask.cli.terminal import say


def train(
    recipe: str,
    /,
    *,
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
    data: str | None = None,
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Train an encoder from a decoder, as a recipe says.

    Parameters
    ----------
    recipe
        A TOML file; recipes/ has the published ones and ours, docs/training.md says what may stand in it.
    output
        Folder of the run: checkpoints, metrics, and at the end the adapter or model.
    data
        Folder that the recipe's paths are taken from. Left out: the recipe's own folder.
    set
        Override a field, as in --set optimiser.lr=1e-4 or --set data.nli.limit=1000. May be repeated.
    resume
        Continue the run that is in the output folder.
    dry_run
        Read the data and print counts, tokens, memory and time; train nothing.
    """
    from pathlib import Path

    from rich.console import Console

    from unmask.errors import UsageError
    from unmask.training.recipe import read_recipe

    chosen = read_recipe(Path(recipe), set)
    folder = Path(data) if data else Path(recipe).parent
    if dry_run:
        from unmask.training.plan import plan
        from unmask.training.terminal import print_plan

        print_plan(plan(chosen, folder, say), Console())
        return 0
    if output is None:
        raise UsageError("--output names the folder of the run; --dry-run needs none")
    from unmask.training.terminal import training_bar
    from unmask.training.train import train as run_training

    with training_bar(Console(stderr=True)) as progress:
        outcome = run_training(chosen, data=folder, output=Path(output), resume=resume, progress=progress, say=say)
    if not outcome.first:
        return 0
    scores = "".join(f", {name} {score:.2f}" for name, score in outcome.scores.items())
    say(f"{chosen.steps} steps -> {outcome.result}{scores}")
    return 0
