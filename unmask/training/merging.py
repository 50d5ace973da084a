"""Merge models: adapters into weights, interpolation of two models, the average of a run's checkpoints.

Weights are combined in float32, a tensor at a time. Adapters are combined as products (`adapter_products`).
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.checkpoint.adapter import Adapter
from unmask.checkpoint.head import HEAD_FILE
from unmask.checkpoint.resolve import local_path
from unmask.checkpoint.tensors import LM_HEAD, TensorSource
from unmask.encoder.head import UNIT_LINEAR, head_steps
from unmask.encoder.model.architectures import shape_of
from unmask.errors import AdapterMismatch, CheckpointError, UsageError
from unmask.training.adapter_products import Factors, compress, weighted_sum, write_factors
from unmask.training.lora import parts_of
from unmask.training.model_folder import (
    DTYPES,
    EncoderSettings,
    adapter_settings,
    require_new,
    write_head,
    write_model,
    write_model_folder,
)
from unmask.training.recipe import Recipe
from unmask.training.training_model import adapter_base

__all__ = ["average", "interpolate", "merge_adapters", "stack", "write_model"]

# Below this angle the slerp's own formula divides by almost nothing, and a straight line is the same.
_NEARLY_PARALLEL = 1 - 1e-7

Dtype = Literal["float32", "bfloat16", "float16"]


def merge_adapters(base: str, adapters: Sequence[str], output: Path, dtype: Dtype = "float32") -> None:
    """Add adapters to the weights of a base, in the order given, and write the model.

    Args:
        base: whatever `Encoder.load` takes; the name of an adapter means its base and the adapters below it.
        output: a new folder.
        dtype: precision of the file. The sum is float32 in any case, but bfloat16 then rounds small updates away.

    Raises:
        CheckpointError: the files cannot be used, or do not fit each other.
        UsageError: nothing to merge, or the folder exists.
        StorageError: it cannot be written.
    """
    require_new(output)
    checkpoint = open_checkpoint(base, adapters)
    merged = [file for file in checkpoint.files if file.name == "adapter_config.json"]
    if not merged:
        raise UsageError(f"{base} is a model without adapters, and none was named; there is nothing to merge")
    write_model_folder(
        output, checkpoint, checkpoint.tensors, EncoderSettings.from_checkpoint(checkpoint), DTYPES[dtype]
    )


def interpolate(
    first: str,
    second: str,
    weight: float,
    output: Path,
    method: Literal["linear", "slerp"] = "linear",
    dtype: Dtype = "float32",
) -> None:
    """Interpolate between two models of one architecture and write the result.

    Args:
        first, second: whatever `Encoder.load` takes, adapters found by name included.
        weight: 0 is the first, 1 the second.
        method: along the straight line, or `slerp` for each tensor.

    Raises:
        UsageError: the weight is not between 0 and 1, or the models do not fit each other; the first tensor that
            does not is named.
    """
    if not 0.0 <= weight <= 1.0:  # also refuses NaN
        raise UsageError(f"--weight {weight}: 0 is the first model, 1 the second; choose something between")
    require_new(output)
    models = [open_checkpoint(name) for name in (first, second)]
    _require_alike(models)
    between = slerp if method == "slerp" else torch.lerp
    blend = _CombinedTensors(
        [model.tensors for model in models], lambda tensors: between(tensors[0], tensors[1], weight)
    )
    chosen = next((model for model in reversed(models) if model.encoder_config), models[0])
    write_model_folder(output, models[0], blend, EncoderSettings.from_checkpoint(chosen), DTYPES[dtype])


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two tensors as flat vectors (K. Shoemake, Animating rotation with quaternion curves,
    SIGGRAPH 1985; between checkpoints of an embedding model as in arXiv 2506.05176).

    The angle is between their directions; lengths are interpolated along with them. Tensors that point the same way,
    or of which one is zero, are interpolated linearly.

    Args:
        a, b: float32, of one shape.
        weight: 0 gives a, 1 gives b, exactly.
    """
    if weight in (0.0, 1.0):
        return (b if weight else a).clone()
    x, y = a.flatten().double(), b.flatten().double()
    lengths = x.norm() * y.norm()
    cosine = float((x @ y) / lengths) if lengths > 0 else 1.0
    if abs(cosine) > _NEARLY_PARALLEL:
        return torch.lerp(a, b, weight)
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    mixed = (torch.sin((1 - weight) * angle) * x + torch.sin(weight * angle) * y) / torch.sin(angle)
    return mixed.to(a.dtype).view_as(a)


@dataclass(frozen=True)
class Combination:
    """Result of combining adapters.

    Attributes:
        rank: rank of the written adapter.
        error: share of the update's Frobenius norm that was lost; 0 if the result is exact.
    """

    rank: int
    error: float


def stack(adapters: Sequence[str], output: Path, rank: int | None = None) -> Combination:
    """Combine adapters into one that has the effect of merging them in turn; exact at the summed rank.

    Args:
        adapters: folders or hub ids, in merging order; each trained on the base of the first, or on top of those
            before it.
        rank: compress the result to this rank and report the loss.

    Raises:
        AdapterMismatch: they were made for different models.
    """
    require_new(output)
    _require_rank(rank)
    if len(adapters) < 2:
        raise UsageError("name two adapters or more to be stacked")
    parts = [_read_factors(name) for name in adapters]
    for index, part in enumerate(parts[1:], start=1):
        below = [parts[0].base, *(earlier.name for earlier in parts[:index])]
        if not any(_same_model(part.base, model) for model in below):
            raise AdapterMismatch(
                f"{part.name} was trained on {part.base or 'an unnamed base'}, which is neither the base of "
                f"{parts[0].name} ({parts[0].base or 'unnamed'}) nor an adapter before it"
            )
    heads = [head for name in adapters if (head := _head_of(name)) is not None]
    return _write_combined(parts, [1.0] * len(parts), rank, output, heads[-1] if heads else None)


def average(models: Sequence[str], output: Path, rank: int | None = None, dtype: Dtype = "float32") -> Combination:
    """Average several checkpoints, usually of one run (model soups, arXiv 2203.05482).

    Adapters, or the `checkpoints/step-N` folders of a run, give an adapter; whole models give a model.

    Args:
        models: two or more of one kind, or one run's folder, which means all the checkpoints that it has kept.
        rank: of the resulting adapter; left out, the sum of their ranks, which is exact.
        dtype: precision of a resulting model.

    Raises:
        AdapterMismatch: adapters of different bases, or of different shapes.
        UsageError: models and adapters together, or models of different shapes.
    """
    require_new(output)
    _require_rank(rank)
    names = _checkpoints_in(models)
    if len(names) < 2:
        raise UsageError(f"{' '.join(models)}: only one checkpoint is there; an average needs two or more")
    adapters = [_is_adapter(name) for name in names]
    if all(adapters):
        parts = [_read_factors(name) for name in names]
        for part in parts[1:]:
            if not _same_model(part.base, parts[0].base):
                raise AdapterMismatch(
                    f"{part.name} was trained on {part.base or 'an unnamed base'}, {parts[0].name} on "
                    f"{parts[0].base or 'an unnamed base'}; only adapters of one base have a mean"
                )
        return _write_combined(parts, [1 / len(parts)] * len(parts), rank, output, _mean_head(names))
    if any(adapters) or rank is not None:
        model = next(name for name, adapter in zip(names, adapters, strict=True) if not adapter)
        raise UsageError(
            f"{model} is a whole model; " + ("--rank is for" if rank else "it cannot be averaged with") + " adapters"
        )
    checkpoints = [open_checkpoint(name) for name in names]
    _require_alike(checkpoints)
    mean = _CombinedTensors([checkpoint.tensors for checkpoint in checkpoints], _mean)
    write_model_folder(output, checkpoints[0], mean, EncoderSettings.from_checkpoint(checkpoints[0]), DTYPES[dtype])
    return Combination(0, 0.0)


def _require_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: give 1 or more, or leave it out to lose nothing")


@dataclass(frozen=True)
class _AdapterHead:
    """The layers behind the pooling that an adapter brings: tensors of its `head.safetensors`, and its settings."""

    tensors: Mapping[str, Tensor]
    encoder_config: Mapping[str, Any]


def _head_of(name: str) -> _AdapterHead | None:
    """Read the head of an adapter or of a run's checkpoint, if it has one of its own.

    Raises:
        UsageError: the head is not trained, so no checkpoint has it, and the run has not ended.
    """
    step = Path(name)
    if not (step / "state.pt").is_file():
        path = local_path(name)
        if not (path / HEAD_FILE).is_file():
            return None
        return _AdapterHead(load_file(path / HEAD_FILE), _settings_of(str(path)))
    parameters = torch.load(step / "state.pt", map_location="cpu", weights_only=True)["parameters"]
    recipe = _recipe_of(step)
    if "head.weight" not in parameters:
        if recipe.head is None:
            return None
        result = step.parent.parent / "adapter"
        if not (result / HEAD_FILE).is_file():
            raise UsageError(
                f"{name}: its head is not trained, so it is written only when the run ends; let the run end first"
            )
        return _head_of(str(result))
    steps = UNIT_LINEAR if recipe.head is not None and recipe.head.normalize else ()
    return _AdapterHead(
        {part: parameters[f"head.{part}"] for part in ("weight", "bias")},
        {**_settings_of(name), "head": list(map(dict, steps))},
    )


def _recipe_of(step: Path) -> Recipe:
    """Read the recipe of the run that a resumable checkpoint belongs to."""
    stored = json.loads((step.parent.parent / "run.json").read_text(encoding="utf-8"))
    return msgspec.convert(stored["recipe"], Recipe)


def _settings_of(name: str) -> dict[str, Any]:
    """Return the encoder's settings that are stored with an adapter, or would be with a run's checkpoint."""
    if (Path(name) / "state.pt").is_file():
        recipe = _recipe_of(Path(name))
        below = open_checkpoint(recipe.base, recipe.adapters, weights=False)
        return adapter_settings(recipe, below.encoder_config)
    file = Path(name) / "llm2vec_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _mean_head(names: Sequence[str]) -> _AdapterHead | None:
    """Average the heads of adapters.

    Raises:
        AdapterMismatch: some have one and others do not, or they differ in shape or in the steps around them.
    """
    heads = [_head_of(name) for name in names]
    first = heads[0]
    for name, head in zip(names, heads, strict=True):
        if (head is None) != (first is None):
            raise AdapterMismatch(f"of {names[0]} and {name} only one has a head.safetensors; they have no mean")
        if head is None or first is None:
            continue
        kinds = [each.encoder_config.get("head") or [] for each in (first, head)]
        shapes = [{key: list(tensor.shape) for key, tensor in each.tensors.items()} for each in (first, head)]
        if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
            raise AdapterMismatch(
                f"{names[0]} and {name} have different heads: {shapes[0]}, steps {kinds[0]}, and {shapes[1]}, steps "
                f"{kinds[1]}; they have no mean"
            )
    if first is None:
        return None
    tensors = {key: _mean([head.tensors[key].float() for head in heads if head is not None]) for key in first.tensors}
    return _AdapterHead(tensors, first.encoder_config)


def _write_combined(
    parts: Sequence[Factors], weights: Sequence[float], rank: int | None, output: Path, head: _AdapterHead | None
) -> Combination:
    combined, error = weighted_sum(parts, weights), 0.0
    if rank is not None and rank < combined.rank:
        combined, error = compress(combined, rank)
    encoder_config: dict[str, Any] = {}
    for part in parts:
        encoder_config = _settings_of(part.name) or encoder_config
    if head is not None:
        encoder_config = {**head.encoder_config, **encoder_config, "head": head.encoder_config.get("head") or []}
    try:
        if head is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_head(output, head.tensors)
        write_factors(output, combined, encoder_config)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # it was not there before
        raise
    return Combination(combined.rank, error)


def _checkpoints_in(models: Sequence[str]) -> list[str]:
    """Replace a run's folder by the checkpoints in it."""
    if len(models) == 1 and (Path(models[0]) / "checkpoints").is_dir():
        return sorted(str(step) for step in (Path(models[0]) / "checkpoints").glob("step-*"))
    return list(models)


def _is_adapter(name: str) -> bool:
    path = local_path(name) if not (Path(name) / "state.pt").is_file() else Path(name)
    return any((path / file).is_file() for file in ("adapter_config.json", "state.pt"))


def _read_factors(name: str) -> Factors:
    if (Path(name) / "state.pt").is_file():
        return _factors_of_state(Path(name))
    path = local_path(name)
    adapter = Adapter(path)
    halves = {module: adapter.halves(module) for module in adapter.modules}
    return Factors(str(path), adapter.config.base, halves)


def _factors_of_state(step: Path) -> Factors:
    """Read the adapter of a run's resumable checkpoint, which holds only the trained parameters of our fused layers."""
    run = step.parent.parent / "run.json"
    try:
        recipe = _recipe_of(step)
        parameters = torch.load(step / "state.pt", map_location="cpu", weights_only=True)["parameters"]
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{step} is not a checkpoint of a run described by {run}: {error}") from error
    if recipe.lora is None:
        raise UsageError(f"{step} belongs to a run that trains all weights; average its best/ or model/ folders")
    shape = shape_of(open_checkpoint(recipe.base).config)
    assert shape is not None  # or the run could not have been started
    scale = recipe.lora.alpha / recipe.lora.rank
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    for index in range(shape.layers):
        for field, modules in parts_of(shape, index, recipe.lora.targets).items():
            down = parameters[f"layers.{index}.{field}.down"].split(recipe.lora.rank)
            for place, (module, _, _) in enumerate(modules):
                halves[module] = down[place], scale * parameters[f"layers.{index}.{field}.up.{place}"]
    return Factors(str(step), adapter_base(recipe.base, recipe.adapters), halves)


def _same_model(a: str | None, b: str | None) -> bool:
    if a is None or b is None or a == b:
        return a == b
    paths = [Path(name).expanduser() for name in (a, b)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _require_alike(models: Sequence[Checkpoint]) -> None:
    """Refuse models whose tensors have different meanings.

    Raises:
        UsageError: names the first difference.
    """
    first = models[0]
    shape = shape_of(first.config)
    for other in models[1:]:
        pair = f"{first.name} and {other.name}"
        kinds = [model.config.get("model_type") for model in (first, other)]
        if kinds[0] != kinds[1]:
            raise UsageError(f"{pair} are of different architectures: {kinds[0]} and {kinds[1]}")
        names = [{n for n in model.tensors.names() if "inv_freq" not in n} for model in (first, other)]
        for name in sorted(names[0] ^ names[1]):
            if name == LM_HEAD and all(model.config.get("tie_word_embeddings") for model in (first, other)):
                continue
            holder, lacking = (first, other) if name in names[0] else (other, first)
            raise UsageError(f"{holder.name} has a tensor {name}, {lacking.name} has not; they cannot be combined")
        for name in sorted(names[0] & names[1]):
            shapes = [list(model.tensors.shape(name)) for model in (first, other)]
            if shapes[0] != shapes[1]:
                raise UsageError(
                    f"{pair} cannot be combined: {name} is {shapes[0]} in one and {shapes[1]} in the other"
                )
        steps = [list(map(dict, head_steps(model.tensors, model.encoder_config))) for model in (first, other)]
        if steps[0] != steps[1]:
            raise UsageError(f"{pair} differ in the steps behind the pooling: {steps[0]} and {steps[1]}")
        if shape_of(other.config) != shape:
            raise UsageError(f"{pair} have tensors of one shape but different configurations; they cannot be combined")
        if first.tokenizer.text.get_vocab() != other.tokenizer.text.get_vocab():
            raise UsageError(f"{pair} have different vocabularies; their embeddings stand for different tokens")


class _CombinedTensors:
    """A `TensorSource` that combines the tensors of several models as they are read."""

    def __init__(self, sources: Sequence[TensorSource], combine: Callable[[list[Tensor]], Tensor]) -> None:
        self._sources, self._combine = sources, combine

    def names(self) -> Sequence[str]:
        return self._sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._sources[0].shape(name)

    def read(self, name: str) -> Tensor:
        return self._combine([source.read(name).float() for source in self._sources])


def _mean(tensors: list[Tensor]) -> Tensor:
    # A running mean: equal tensors stay what they are to the last bit.
    mean = tensors[0].clone()
    for count, tensor in enumerate(tensors[1:], start=2):
        mean += (tensor - mean) / count
    return mean
