"""`unmask merge ...`."""

from typing import Annotated, Literal

from cyclopts import App, Parameter

from unmask.terminal import say

merge = App(name="merge", help="Make one model or adapter out of several.")
_Output = Annotated[str, Parameter(name=["--output", "-o"])]
_Dtype = Literal["float32", "bfloat16", "float16"]


@merge.command(name="adapters")
def merge_adapters(base: str, /, *adapters: str, output: _Output, dtype: _Dtype = "float32") -> int:
    """Merge adapters into the weights of a decoder, and write a model that transformers also reads.

    Parameters
    ----------
    base
        Decoder. The name of an adapter stands for its base and the adapters below it.
    adapters
        Adapters, in the order of merging.
    output
        New folder in the hub's layout.
    dtype
        Precision of the weights in the file.
    """
    from pathlib import Path

    from unmask.training.merging import merge_adapters as run

    run(base, adapters, Path(output), dtype)
    say(f"{base} with {' + '.join(adapters) or 'its adapters'} -> {output}")
    return 0


@merge.command
def linear(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Interpolate two models along a straight line.

    Parameters
    ----------
    a
        Model, or adapter whose base is found by its name.
    b
        Model of the same architecture.
    output
        New folder in the hub's layout.
    weight
        Share of B: 0 gives A, 1 gives B.
    dtype
        Precision of the weights in the file.
    """
    return _interpolate(a, b, output, weight, "linear", dtype)


@merge.command
def slerp(a: str, b: str, /, *, output: _Output, weight: float = 0.5, dtype: _Dtype = "float32") -> int:
    """Interpolate two models along an arc: each tensor turns at a constant speed.

    Parameters
    ----------
    a
        Model, or adapter whose base is found by its name.
    b
        Model of the same architecture.
    output
        New folder in the hub's layout.
    weight
        Share of B: 0 gives A, 1 gives B.
    dtype
        Precision of the weights in the file.
    """
    return _interpolate(a, b, output, weight, "slerp", dtype)


@merge.command
def average(*models: str, output: _Output, rank: int | None = None, dtype: _Dtype = "float32") -> int:
    """Average several checkpoints, usually of one run.

    Parameters
    ----------
    models
        Adapters, checkpoints/step-N folders of a run, or models; or the folder of a run, for all its checkpoints.
    output
        New folder with an adapter or a model.
    rank
        Rank of the resulting adapter. A smaller one than the sum of the ranks is an approximation. Default: the sum.
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
    """Combine adapters that are merged in turn into one adapter.

    Parameters
    ----------
    adapters
        Adapters in the order of merging. Each was trained on the base of the first, or on top of those before it.
    output
        New folder.
    rank
        Rank of the result. A smaller one than the sum of the ranks is an approximation. Default: the sum.
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
