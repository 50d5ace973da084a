"""Make a decoder shallower: a checkpoint with some of its layers, in order.

With the causal mask off, the later layers of a small decoder add little that a linear map could read as meaning
(L3Prune, arXiv 2410.14578, keeps the first ones too). `unmask probe-layers` measures it for a given decoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unmask.checkpoint.checkpoint import Checkpoint
from unmask.checkpoint.tensors import ShearedTensors
from unmask.encoder.model.architectures import shape_of
from unmask.errors import UsageError

Layers = int | Sequence[int]


def parse_layers(text: str) -> list[int] | int:
    """Parse layers from a command line: a count, a range, or a list.

    >>> parse_layers("8"), parse_layers("0-3"), parse_layers("0,4,8")
    (8, [0, 1, 2, 3], [0, 4, 8])
    """
    if text.strip().isdigit():
        return int(text)
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"layers {text!r}: write a count (8), a range (0-7) or a list (0,4,8)")
        layers += range(int(first), int(last) + 1) if dash else [int(first)]
    return layers


def shear(checkpoint: Checkpoint, layers: Layers) -> Checkpoint:
    """Return a checkpoint with some layers of another one. Copies nothing: tensors are read from the other checkpoint.

    Args:
        layers: their number from the first, or their indices from 0 in rising order.

    Raises:
        UsageError: the decoder has no such layer, or none is left.
    """
    total = int(checkpoint.config.get("num_hidden_layers") or 0)
    indices = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= total:
        raise UsageError(
            f"layers {layers!r}: {checkpoint.name} has {total} layers; give a count from 1 to {total}, "
            "or their numbers from 0 in rising order"
        )
    if indices == tuple(range(total)):
        return checkpoint
    return replace(
        checkpoint,
        config=_config(checkpoint.config, indices),
        tensors=ShearedTensors(checkpoint.tensors, indices),
        layers=indices,
    )


def _config(config: Mapping[str, Any], indices: tuple[int, ...]) -> dict[str, Any]:
    sheared = dict(config) | {"num_hidden_layers": len(indices)}
    total = int(config["num_hidden_layers"])
    for key, value in config.items():
        if isinstance(value, list) and len(value) == total and key.startswith(("layer", "no_rope", "mlp_only")):
            sheared[key] = [value[index] for index in indices]
    # A rule such as "every sixth layer attends to everything" counts from the first layer: it still holds if the
    # kept layers are the first ones, and is written out otherwise.
    positional = config.get("sliding_window") and "layer_types" not in config
    if positional and indices != tuple(range(len(indices))):
        shape = shape_of(config)
        if shape is None:
            raise UsageError(f"layers {list(indices)}: this {config.get('model_type')} keeps only its first layers")
        kinds = ["full_attention" if window is None else "sliding_attention" for window in shape.windows]
        sheared["layer_types"] = [kinds[index] for index in indices]
    return sheared
