"""`unmask probe-layers` and `unmask shear`: how many layers of a decoder are worth keeping, and keeping them."""

from typing import Annotated, Literal

from cyclopts import Parameter

from unmask.cli.terminal import say


def shear(
    base: str,
    /,
    *,
    layers: str,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> int:
    """Write a decoder with only some of its layers.

    Parameters
    ----------
    base
        A decoder: a hub id, a folder, a GGUF file.
    layers
        How many from the first (8), a range (0-7), or a list (0,4,8). `unmask probe-layers` helps to choose.
    output
        A new folder in the hub's layout.
    dtype
        Precision of the file.
    """
    from pathlib import Path

    from unmask.checkpoint import open_checkpoint
    from unmask.encoder.shear import parse_layers
    from unmask.encoder.shear import shear as cut
    from unmask.training.model_folder import DTYPES, Settings, write_folder

    checkpoint = cut(open_checkpoint(base), parse_layers(layers))
    write_folder(Path(output), checkpoint, checkpoint.tensors, Settings.of(checkpoint), DTYPES[dtype])
    say(f"{checkpoint.config['num_hidden_layers']} layers of {base} -> {output}")
    return 0


def probe_layers(
    recipe: str,
    /,
    *,
    data: str | None = None,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    texts: int = 4500,
    held_out: int = 500,
    causal: Annotated[bool, Parameter(negative=())] = False,
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
) -> int:
    """Measure which layers of a decoder a teacher's vectors need.

    For each layer: how much of the vectors a linear map reads from its states. It shows how many layers to keep.

    Parameters
    ----------
    recipe
        A TOML file with a base, data and a distillation; its dev sets are scored too. Nothing is trained.
    data
        Folder that the recipe's paths are taken from. Left out: the recipe's own folder.
    output
        Folder for probe.json, probe.svg and probe.png.
    texts
        Texts of the data to probe with.
    held_out
        So many of them are judged on and not fitted.
    causal
        Draw the curve with the causal mask as well.
    set
        Override a field, as in --set base=org/name. May be repeated.
    """
    from pathlib import Path

    from rich.console import Console

    from unmask.training.layer_probe import probe_recipe
    from unmask.training.recipe import read_recipe
    from unmask.training.terminal import print_probe

    chosen = read_recipe(Path(recipe), set)
    folder = Path(data) if data else Path(recipe).parent
    curves = probe_recipe(chosen, folder, Path(output), texts, held_out, causal, say)
    print_probe(curves, Console())
    return 0
