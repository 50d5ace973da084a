"""Sources of tensors, under the names of the inner model (`layers.0.self_attn.q_proj.weight`).

Hub checkpoints spell the same tensor differently: `model.layers...` in a CausalLM file, `layers...` in the file
of a bare `LlamaModel`, `language_model.model.layers...` in a multimodal one. Every source here uses the
innermost name, so the code that builds a model knows one spelling.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from unmask.errors import CheckpointError

EMBEDDING = "embed_tokens.weight"
# Head of a language model, which predicts tokens. The head behind the pooling is in `checkpoint.head`.
LM_HEAD = "lm_head.weight"
# Rows of a weight as 8-bit steps: `X.weight` holds int8 and this suffix the float32 size of a step in each row.
STEP = "_scale"
# Last sentence of errors about quantised weights.
UNQUANTISED = "Use the unquantised checkpoint (float32, bfloat16 or float16) of this model"

_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")
_OUTER = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)*")


class TensorSource(Protocol):
    """Named tensors that are read one at a time, so that a model is never in memory twice."""

    def names(self) -> Sequence[str]:
        """Return the innermost names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape without reading the data."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor to the CPU, in its stored precision."""
        ...


class AbsentTensors:
    """Stands in for weights that were not loaded. Reading one is an error that says so.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def names(self) -> Sequence[str]:
        """Raise CheckpointError."""
        raise self._error()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raise CheckpointError."""
        raise self._error()

    def read(self, name: str) -> torch.Tensor:
        """Raise CheckpointError."""
        raise self._error()

    def _error(self) -> CheckpointError:
        return CheckpointError(f"{self._name} was opened without its weights")


def innermost(name: str) -> str:
    """Strip the wrappers around the decoder's own tensor name.

    >>> innermost("model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    return _OUTER.sub("", name)


def open_tensors(folder: Path) -> TensorSource:
    """Open the weights in a hub-layout folder: safetensors before `pytorch_model.bin`, sharded or in one file.

    Raises:
        CheckpointError: none of the known files is there, a shard is missing, or a file is damaged.
    """
    opener, files, _ = _find_weights(folder)
    return opener(files)


def further_weights(folder: Path, usual: Sequence[Path]) -> list[Path]:
    """Return the files that decide the weights of a folder and are not among those with usual names.

    A shard index may name any file; it counts itself then. Where it names usual files alone, no more is returned, so
    that the revisions of all such folders stay as they were recorded.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    _, opened, index = _find_weights(folder)
    further = [file for file in opened if file not in usual]
    return [*further, index] if further and index is not None else further


def _find_weights(folder: Path) -> tuple[Callable[[Sequence[Path]], TensorSource], list[Path], Path | None]:
    """Return what opens the weights of a folder, their files, and the index that names these."""
    # In the order of transformers: where a folder was written twice, one file is newer than stale shards beside it.
    for name, opener in (("model.safetensors", SafetensorsFiles), ("pytorch_model.bin", PickledFiles)):
        if (folder / name).is_file():
            return opener, [folder / name], None
        if (index := folder / f"{name}.index.json").is_file():
            return opener, _shards(index), index
    raise CheckpointError(
        f"{folder} holds no weights: looked for model.safetensors, pytorch_model.bin and their .index.json; "
        f"found {_listing(folder)}"
    )


def _shards(index: Path) -> list[Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a shard index (no usable weight_map): {error}") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} points outside its own folder; refusing to follow it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        examples = ", ".join(missing[:3])
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(names)} shards in {index.name}: {examples}")
    return [index.parent / name for name in names]


def _require_equal(first: torch.Tensor, second: torch.Tensor, key: str, file: Path) -> None:
    """Refuse one tensor under two names or in two shards, unless both say the same."""
    if not torch.equal(first, second):
        raise CheckpointError(
            f"{file}: {key} is there twice, with different numbers: in two shards, or with and without a prefix such "
            "as model.; nothing says which one counts"
        )


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


class _StoredTensor(NamedTuple):
    """A tensor in a safetensors file, by its header; `dtype` is in the words of the format."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> torch.Tensor:
        """Return the tensor. Its file is mapped as long as it lives.

        Raises:
            CheckpointError: the file has changed since it was opened, and does not hold it any more.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.file), framework="pt") as handle:
                return handle.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise _damage(self.file, error) from error


def _require_steps_of_rows(weight: _StoredTensor | None, step: _StoredTensor) -> None:
    """Check that a weight and its step sizes are in the format of int8 rows.

    Raises:
        CheckpointError: they are not; other formats have scales of that name for a block, a group or a whole tensor.
    """
    if weight is not None and weight.dtype == "I8" and len(weight.shape) == 2:
        rows = weight.shape[0]
        if step.shape in ((rows,), (rows, 1)):
            return
    stored = "no weight" if weight is None else f"a weight {list(weight.shape)} in {weight.dtype}"
    raise CheckpointError(
        f"{step.file}: {step.key} {list(step.shape)} belongs to {stored}; unmask reads int8 weights with one scale per "
        f"row alone. {UNQUANTISED}"
    )


class SafetensorsFiles:
    """Safetensors files. Each is mapped anew for each tensor: pages stay in memory as long as their file is mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, _StoredTensor] = {}
        self._steps: dict[str, _StoredTensor] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt")
                for key in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                    header = handle.get_slice(key)
                    stored = _StoredTensor(file, key, tuple(header.get_shape()), header.get_dtype())
                    name = innermost(key)
                    if name.endswith(f".weight{STEP}"):
                        self._steps[name.removesuffix(STEP)] = stored
                        continue
                    if name in self._where:
                        _require_equal(self._where[name].read(), handle.get_tensor(key), key, file)
                    self._where[name] = stored
            except (SafetensorError, OSError) as error:
                raise _damage(file, error) from error
        for name, step in self._steps.items():
            _require_steps_of_rows(self._where.get(name), step)

    def names(self) -> Sequence[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def read(self, name: str) -> torch.Tensor:
        tensor = self._where[name].read()
        if name not in self._steps:
            return tensor
        return tensor.float() * self._steps[name].read().float().reshape(-1, 1)


def _damage(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or truncated ({error}); delete it and fetch it again")


class PickledFiles:
    """`pytorch_model.bin`, read with torch's restricted unpickler, which runs no code."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for key, value in read_pickled(file).items():
                name = innermost(key)
                if name in self._tensors:
                    _require_equal(self._tensors[name], value, key, file)
                self._tensors[name] = value

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class FiniteTensors:
    """Tensors of another source. Reading one that holds NaN, infinity, or the steps of a quantisation raises an error.

    One pass for the smallest and the largest number, without a copy: 0.09 s for 28M float32 numbers on two busy cores.
    """

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source, self._name = source, name

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        require_unquantised(tensor, name, self._name)
        require_finite(tensor, name, self._name)
        return tensor


def require_unquantised(tensor: torch.Tensor, name: str, file: object) -> None:
    """Check that a tensor of a file holds numbers, and not steps whose size another tensor says.

    Raises:
        CheckpointError: its elements have 8 bits or fewer, or are the whole numbers of a packed weight.
    """
    is_packed = name.endswith(".weight") and not tensor.is_floating_point()
    if tensor.dtype != torch.bool and (tensor.element_size() == 1 or is_packed):
        raise CheckpointError(
            f"{file}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, in a format that unmask "
            f"does not dequantise. {UNQUANTISED}"
        )


def require_finite(tensor: torch.Tensor, name: str, file: object) -> None:
    """Check that a tensor of a file holds numbers only.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats have no minimum in torch
    if not all(map(math.isfinite, (end.item() for end in torch.aminmax(wide.detach())))):
        broken = int((~torch.isfinite(wide)).sum())
        raise CheckpointError(
            f"{file}: tensor {name} holds NaN or infinity in {broken} of {tensor.numel()} places; the run that wrote "
            "it diverged, or the file is damaged. Use an earlier checkpoint, or fetch the file again"
        )


class BorrowedEmbedding:
    """Tensors of a file that has only layers, with the token embedding of another model."""

    def __init__(self, layers: TensorSource, below: TensorSource) -> None:
        self._layers, self._below = layers, below

    def names(self) -> Sequence[str]:
        own = self._layers.names()
        return own if EMBEDDING in own else [EMBEDDING, *own]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner(name).shape(name)

    def read(self, name: str) -> torch.Tensor:
        return self._owner(name).read(name)

    def _owner(self, name: str) -> TensorSource:
        return self._below if name == EMBEDDING and EMBEDDING not in self._layers.names() else self._layers


class ShearedTensors:
    """Tensors of some layers, renumbered from 0, and the tensors that belong to no layer."""

    def __init__(self, tensors: TensorSource, layers: Sequence[int]) -> None:
        self._tensors = tensors
        numbers = {old: new for new, old in enumerate(layers)}
        self._sources: dict[str, str] = {}
        for name in tensors.names():
            match = _LAYER.match(name)
            if match is None:
                self._sources[name] = name
            elif int(match[1]) in numbers:
                self._sources[f"layers.{numbers[int(match[1])]}.{match[2]}"] = name

    def names(self) -> Sequence[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._sources[name])

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(self._sources[name])


def read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """Read a `.bin` state dict that holds only tensors.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors (which could run code).
    """
    import pickle

    try:
        # An archive that torch wrote since 1.6 can be mapped; older ones are read whole.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or is damaged; refusing to run what is in it. "
            "Convert it to safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or truncated; delete it and fetch it again ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a state dict: expected names and tensors only")
    return content


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"
