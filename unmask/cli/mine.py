"""`unmask mine`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unmask.cli.known_models import checks_known_models
from unmask.terminal import Progress, Step, say
from unmask.training.mining_settings import MiningSettings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MiningOptions(MiningSettings):
    """`MiningSettings` as options: the source is an argument."""

    source: Annotated[str, Parameter(name="SOURCE")] = field(kw_only=False)


@checks_known_models
def mine(options: MiningOptions, *, model: str, output: Annotated[Path, Parameter(name=["--output", "-o"])]) -> int:
    """Find hard negatives for training data.

    A hard negative is a text near the query that is not its answer. An interrupted run continues when
    you repeat the command.

    Parameters
    ----------
    model
        Model whose vectors decide, written as for "unmask evaluate".
    output
        JSON lines with query, positive and negatives, as a recipe takes them.
    """
    from unmask.evaluate.models import open_model
    from unmask.training.mining import mine as run_mining

    counts: dict[str, int] = {}
    with Progress() as progress:

        def show(stage: str, advanced: int, total: int) -> None:
            counts[stage] = counts.get(stage, 0) + advanced
            progress.show(Step(stage, counts[stage], total))

        done = run_mining(options, open_model(model, {"dtype": "float32"}), output, show)
    negatives = ", ".join(f"{rows} got {count}" for count, rows in enumerate(done.rows_by_negatives) if rows)
    say(f"{done.rows} rows over {done.texts} texts -> {output}: {negatives}")
    say(f"the margin refused {done.refused} candidates")
    return 0
