"""`unmask merge ...`."""

from typing import Annotated, Literal

from cyclopts import App, Parameter

from unmask.cli.terminal import say

merge = App(name="merge", help="Make one model or adapter out of several.")
_Output = Annotated[str, Parameter(name=["--output", "-o"])]
_Dtype = Literal["float32", "bfloat16", "float16"]


@merge.command(name="adapters")
def merge_adapters(base: str, /, *adapters: str, output: _Output, dtype: _Dtype = "float32") -> int:
    """Add adapters to the weights of a base, and write a model that transformers reads too.

    Parameters
    ----------
    base
        A decoder. The name of an adapter means its base and the adapters below it.
    adapters
        Adapters, merged in this order.
    output
        A new folder in the hub's layout.
    dtype
        Precision of the file.
    """
    from pathlib import Path

    from unmask.training.merging import merge_adapters as run

    run(base, adapters, Path(output), dtype)
    say(f"{base} with {' + '.join(adapters) or 'its adapters'} -> {output}")
    return 0


@merge.command
def linear(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Write the model between two, along the straight line.

    Parameters
    ----------
    a
        A model, or an adapter, whose base is found by its name.
    b
        Another of the same architecture.
    output
        A new folder in the hub's layout.
    weight
        0 is A, 1 is B.
    dtype
        Precision of the file.
    """
    return _interpolate(a, b, output, weight, "linear", dtype)


@merge.command
def slerp(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Write the model between two, turning each tensor at a constant speed.

    Parameters
    ----------
    a
        A model, or an adapter, whose base is found by its name.
    b
        Another of the same architecture.
    output
        A new folder in the hub's layout.
    weight
        0 is A, 1 is B.
    dtype
        Precision of the file.
    """
    return _interpolate(a, b, output, weight, "slerp", dtype)


@merge.command
def average(*models: str, output: _Output, rank: int | None = None, dtype: _Dtype = "float32") -> int:
    """Write the mean of several checkpoints, usually of one run.

    Parameters
    ----------
    models
        Adapters, checkpoints/step-N folders of a run, or whole models; or one run's folder, for all its checkpoints.
    output
        A new folder: an adapter, or a model.
    rank
        Of the resulting adapter, with the nearest that has it. Left out: the sum of their ranks, which is exact.
    dtype
        Precision of a resulting model.
    """
    from pathlib import Path

    from unmask.training.merging import average as run

    done = run(models, Path(output), rank, dtype)
    say(f"the mean of {' '.join(models)} -> {output}{_rank_note(done.rank, done.error)}")
    return 0


@merge.command
def stack(*adapters: str, output: _Output, rank: int | None = None) -> int:
    """Write one adapter that does what several do when merged in turn.

    Parameters
    ----------
    adapters
        Adapters in merging order, each trained on the base of the first or on top of those before it.
    output
        A new folder.
    rank
        Of the result, with the nearest adapter that has it. Left out: the sum of their ranks, which is exact.
    """
    from pathlib import Path

    from unmask.training.merging import stack as run

    done = run(adapters, Path(output), rank)
    say(f"{' + '.join(adapters)} -> {output}{_rank_note(done.rank, done.error)}")
    return 0


def _interpolate(a: str, b: str, output: str, weight: float, method: Literal["linear", "slerp"], dtype: _Dtype) -> int:
    from pathlib import Path

    from unmask.training.merging import interpolate

    interpolate(a, b, weight, Path(output), method, dtype)
    say(f"{weight:g} of the way from {a} to {b} -> {output}")
    return 0


def _rank_note(rank: int, error: float) -> str:
    if not rank:
        return ""
    return f", rank {rank}" + (f"; {error:.2%} of the update's norm is lost" if error else ", exact")
