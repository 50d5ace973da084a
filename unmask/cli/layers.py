"""`unmask probe-layers`, `unmask shear` and `unmask deepen`: how many layers are worth keeping; fewer, and more."""

from typing import Annotated, Literal

from cyclopts import Parameter

from unmask.cli.known_models import checks_known_models
from unmask.terminal import print_result, print_table, say


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
        Decoder: a hub id, a folder or a GGUF file.
    layers
        Number of layers from the first (8), a range (0-7) or a list (0,4,8). "unmask probe-layers" helps to choose.
    output
        New folder in the hub's layout.
    dtype
        Precision of the weights in the file.
    """
    from pathlib import Path

    from unmask.checkpoint import open_checkpoint
    from unmask.encoder.shear import parse_layers
    from unmask.encoder.shear import shear as cut
    from unmask.training.model_folder import DTYPES, EncoderSettings, write_model_folder

    checkpoint = cut(open_checkpoint(base), parse_layers(layers))
    write_model_folder(
        Path(output), checkpoint, checkpoint.tensors, EncoderSettings.from_checkpoint(checkpoint), DTYPES[dtype]
    )
    say(f"{checkpoint.config['num_hidden_layers']} layers of {base} -> {output}")
    return 0


def deepen(
    model: str,
    /,
    *,
    donor: str,
    layers: str,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> int:
    """Write a model with further layers on top, to be trained deeper.

    The new layers begin as the identity, so that the vectors are the same until they are trained.

    Parameters
    ----------
    model
        Model to go on from: a hub id, a folder or a GGUF file.
    donor
        Decoder of the same shape that the layers are taken from, such as the model's base.
    layers
        The donor's layers: a range (6-9) or a list (6,8).
    output
        New folder in the hub's layout.
    dtype
        Precision of the weights in the file.
    """
    from dataclasses import replace
    from pathlib import Path

    from unmask.checkpoint import open_checkpoint
    from unmask.checkpoint.resolve import resolve
    from unmask.encoder.deepen import deepen as add_layers
    from unmask.encoder.shear import parse_layers
    from unmask.training.model_folder import DTYPES, EncoderSettings, write_model_folder
    from unmask.training.training_model import embedding_base

    chosen = parse_layers(layers)
    indices = [chosen] if isinstance(chosen, int) else chosen  # a number alone is a layer here, not a count
    checkpoint = add_layers(open_checkpoint(model), open_checkpoint(donor), indices)
    settings = EncoderSettings.from_checkpoint(checkpoint)
    if resolve(model).embedding is not None:  # it goes on taking its token embedding from another model
        settings = replace(settings, embedding_from=embedding_base(model))
    write_model_folder(Path(output), checkpoint, checkpoint.tensors, settings, DTYPES[dtype])
    say(f"{checkpoint.config['num_hidden_layers']} layers, {len(indices)} of them of {donor} -> {output}")
    return 0


@checks_known_models
def probe_layers(
    recipe: str,
    /,
    *,
    data: str | None = None,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    texts: int = 4500,
    held_out: int = 500,
    causal: bool = False,
    set: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
) -> int:
    """Measure which layers of a decoder a teacher's vectors need.

    For each layer a linear map is fitted from its states to the vectors. The curve shows how many layers to keep.

    Parameters
    ----------
    recipe
        TOML file with a base, data and a distillation. Its dev sets are scored too. Nothing is trained.
    data
        Folder that the recipe's paths start from. Default: the recipe's own folder.
    output
        Folder for probe.json, probe.svg and probe.png.
    texts
        Number of texts to probe with.
    held_out
        Number of these texts that are not fitted but scored.
    causal
        Also draw the curve with the causal mask.
    set
        Override a field, as in --set base=org/name. Repeat it for several.
    """
    from pathlib import Path

    from unmask.training.layer_probe import probe_recipe
    from unmask.training.recipe_file import read_recipe

    chosen = read_recipe(Path(recipe), set)
    folder = Path(data) if data else Path(recipe).parent
    curves = probe_recipe(chosen, folder, Path(output), texts, held_out, causal, say)
    for name, scores in curves.items():
        print_result(name)
        headings = ("layers kept", "cosine", *scores[0].graded)
        rows = [
            (score.layer, f"{score.cosine:.4f}", *(f"{value:.2f}" for value in score.graded.values()))
            for score in scores
        ]
        print_table(headings, rows, right=headings)
    return 0
