"""Prepacked weights on disk: a model that was loaded once starts again without its checkpoint being read.

The first load of a model writes its weights, adapters merged and in the layout of the compiled kernels, to a file
under UNMASK_HOME. Later loads map that file into memory: nothing is converted, rows of the token embedding that no
text needs stay on the disk, and all processes on the machine share one copy.

    8 bytes     length of the header
    header      JSON: the format's version, sum of the content, and each tensor's type, shape and place
    content     tensors, each at a multiple of 64 bytes

A file's name has everything that decides its content: the model's revision, the precision, and the kernels. A damaged
file is written again. Nothing depends on these files, so a disk that refuses one costs only time.
"""

import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmask.disk import atomic_write, locked_where_possible
from unmask.encoder.model.architectures import Shape
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear, prepack, terms_of
from unmask.errors import StorageError
from unmask.home import home

log = logging.getLogger("unmask")

_FORMAT = 1
_ALIGNMENT = 64
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_BLOCK = 1 << 20
_MAX_HEADER = 1 << 26
# A model with fewer weights gets no file: its checkpoint loads fast enough.
_FEW_WEIGHTS = 4_000_000
# Largest size of one file. A larger model loads from its checkpoint each time.
_MAX_FILE_BYTES = 2 << 30
# Largest size of all files together. The least recently used file is deleted first.
_MAX_BYTES = 4 << 30


def load_prepacked(
    revision: str, shape: Shape, dtype: torch.dtype, causal: bool, load: Callable[[], Decoder]
) -> Decoder:
    """A decoder with prepacked weights: from its file, else loaded, prepacked, and written for the next time.

    Args:
        revision: content address of the weights.
        dtype: precision that linear layers are rounded to, float32 or bfloat16.
        load: reads the checkpoint.
    """
    library = kernels.library()
    decoder = _empty_decoder(shape, causal)
    if library is None or sum(parameter.numel() for parameter in decoder.parameters()) < _FEW_WEIGHTS:
        return _prepacked(load(), dtype)
    terms = terms_of(dtype)
    kind = f"bfloat16x{terms}" if terms else str(dtype).removeprefix("torch.")
    name = f"{revision}-{kind}-{Path(library._name).stem}.weights"
    file = home() / "prepacked" / name
    for linear in _linears_of(decoder).values():
        linear.terms = terms
    if _fill(decoder, file):
        return decoder
    with locked_where_possible(file.with_suffix(".lock")):
        if _fill(decoder, file):
            return decoder
        loaded = _prepacked(load(), dtype)
        try:
            _write(file, dict(_tensors_of(loaded)))
        except StorageError as error:
            log.warning("prepacked weights are not kept, so the next start takes as long as this one: %s", error)
            return loaded
    return decoder if _fill(decoder, file) else loaded


def _empty_decoder(shape: Shape, causal: bool) -> Decoder:
    with torch.device("meta"):
        return Decoder(shape, causal).eval()


def _prepacked(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    prepack(decoder, dtype)
    return decoder


def _tensors_of(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and prepacked weights by name."""
    for name, parameter in decoder.named_parameters():
        yield name, parameter.detach()
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and module.prepacked is not None:
            yield f"{name}.prepacked", module.prepacked


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, unless they are too many, and remove the files that they replace. Raises StorageError."""
    table: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        table[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at]
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    if at > _MAX_FILE_BYTES:
        return
    total = sum(_sum(_bytes(tensor)) for tensor in tensors.values()) % (1 << 64)
    header = json.dumps({"format": _FORMAT, "sum": total, "bytes": at, "tensors": table}).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    with atomic_write(file) as partial, partial.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            out.write(_bytes(tensor).data)
            out.write(bytes(-tensor.nbytes % _ALIGNMENT))
    _make_room(file)


def _make_room(newest: Path) -> None:
    """Remove files of older kernels, and the files that were not used for longest if there are too many."""
    kind, _, _ = newest.name.rpartition("-")
    with suppress(OSError):
        files = sorted(newest.parent.glob("*.weights"), key=lambda file: file.stat().st_mtime, reverse=True)
        room = _MAX_BYTES
        for file in files:
            room -= file.stat().st_size
            if file != newest and (room < 0 or file.name.startswith(f"{kind}-")):
                file.unlink()
                file.with_suffix(".lock").unlink(missing_ok=True)


def _fill(decoder: Decoder, file: Path) -> bool:
    """Give a decoder the weights of a file, mapped into memory. False if there is no such file, or a damaged one."""
    try:
        with file.open("rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, _MAX_HEADER)))
            if header["format"] != _FORMAT or os.fstat(opened.fileno()).st_size != 8 + length + header["bytes"]:
                raise ValueError("it is cut short, or of another version")
            if _sum_of_rest(opened) != header["sum"]:
                raise ValueError("its content has changed")
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {name: _mapped(content, 8 + length, *entry) for name, entry in header["tensors"].items()}
        _assign(decoder, tensors)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("%s is written again: %s", file, error)
        return False
    with suppress(OSError):
        os.utime(file)  # it is in use
    return True


def _mapped(content: mmap.mmap, start: int, dtype: str, shape: list[int], at: int) -> Tensor:
    count = math.prod(shape)
    return torch.frombuffer(content, dtype=_TYPES[dtype], count=count, offset=start + at).view(shape)


def _linears_of(decoder: Decoder) -> dict[str, Linear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, Linear)}


def _assign(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Set every parameter and prepacked weight of a decoder. Raises ValueError if the tensors are not its own."""
    linears = _linears_of(decoder)
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    packed_weights = {f"{name}.weight" for name in linears}
    expected = {name for name in shapes if name not in packed_weights} | {f"{name}.prepacked" for name in linears}
    if expected != set(tensors):
        raise ValueError("it has other tensors than the model")
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        if kind == "prepacked":
            linears[owner].register_parameter("weight", None)
            linears[owner].prepacked = tensor
        elif tensor.shape != shapes[name]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}")
        else:
            setattr(decoder.get_submodule(owner), kind, nn.Parameter(tensor))


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _sum(content: np.ndarray) -> int:
    """Sum of bytes [n] as 64-bit words modulo 2^64: as fast as memory, and any single change shows."""
    whole = len(content) // 8 * 8
    rest = bytes(content[whole:]).ljust(8, b"\0")
    words = content[:whole].view("<u8")
    return (int(np.add.reduce(words, dtype=np.uint64)) + int.from_bytes(rest, "little")) % (1 << 64)


def _sum_of_rest(file: FileIO) -> int:
    """Sum of the rest of an open file. It is read and not mapped, so that it does not become this process's memory."""
    block, total = np.empty(_BLOCK, dtype=np.uint8), 0
    while count := file.readinto(block.data):
        total += _sum(block[:count])
    return total % (1 << 64)
