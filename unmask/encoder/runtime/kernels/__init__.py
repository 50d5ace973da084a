"""Compiled kernels for CPUs: the binding of `kernels.c`, or nothing where no library fits this machine.

A wheel brings the libraries. From a source tree, the one for this processor is compiled at the first use, where there
is a C compiler. Otherwise everything runs on torch's operations.
"""

import ctypes
import logging
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from unmask.encoder.runtime.kernels import build
from unmask.home import home

log = logging.getLogger("unmask")

_Pointer = ctypes.c_void_p
_Integer = ctypes.c_int64

# Storage of a weight, as in kernels.c.
FLOAT32, BFLOAT16, INT8, ROW_MAJOR, TILES = 0, 1, 2, 3, 4
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


class LinearWeight(ctypes.Structure):
    """`Linear` of kernels.c."""

    _fields_ = (
        *((name, _Pointer) for name in ("weight", "bias")),
        *((name, _Integer) for name in ("n", "k", "kind", "terms")),
    )


class LayerWeights(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = (
        *((name, LinearWeight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Pointer) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Pointer) for name in ("attention_out_norm", "mlp_out_norm")),
        *((name, _Integer) for name in ("reach", "rope")),
    )


class ModelArguments(ctypes.Structure):
    """`Model` of kernels.c."""

    _fields_ = (
        *((name, _Integer) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "activation")),
        *((name, _Integer) for name in ("causal", "num_layers")),
        *((name, ctypes.c_float) for name in ("eps", "attention_scale", "softcap", "embedding_scale")),
        *((name, _Pointer) for name in ("embedding", "final_norm", "layers")),
    )


class Pack(ctypes.Structure):
    """`Pack` of kernels.c."""

    _fields_ = (
        *((name, _Integer) for name in ("tokens", "sequences", "max_seqlen")),
        *((name, _Pointer) for name in ("ids", "cu_seqlens")),
        *((name, _Pointer * 2) for name in ("cosines", "sines")),
        *((name, _Pointer) for name in ("x", "shared", "private")),
        *((name, ctypes.c_int) for name in ("arrived", "round")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The kernels for this processor; None where there are none."""
    target = _target()
    if target is None:
        return None
    path = _installed(target) or _compiled(target)
    if path is None:
        return None
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("compiled kernels are not used: %s", error)
        return None
    kernels.panel_columns.restype = _Integer
    kernels.shared_floats.argtypes, kernels.shared_floats.restype = [_Pointer, _Integer], _Integer
    kernels.private_floats.argtypes, kernels.private_floats.restype = [_Pointer, _Integer], _Integer
    kernels.forward.argtypes, kernels.forward.restype = [_Pointer, _Pointer, ctypes.c_int, ctypes.c_int], None
    kernels.linear_floats.argtypes, kernels.linear_floats.restype = [_Pointer], _Integer
    kernels.use_tiles.argtypes, kernels.use_tiles.restype = [ctypes.c_int], ctypes.c_int
    kernels.linear.argtypes, kernels.linear.restype = [_Pointer, _Integer, _Pointer, _Pointer, _Pointer], None
    kernels.quantise_rows.argtypes, kernels.quantise_rows.restype = [_Integer, _Integer, *(_Pointer,) * 5], None
    kernels.rescale_rows.argtypes, kernels.rescale_rows.restype = [_Integer, _Integer, *(_Pointer,) * 3], None
    return kernels


def _target() -> str | None:
    """This processor's entry in `build.TARGETS`."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        target = "neon"
    else:
        target = torch.backends.cpu.get_cpu_capability().lower()
    return target if target in build.targets() else None


@cache
def has_amx() -> bool:
    """True if the kernels multiply bfloat16 in the tile registers of this processor (Intel AMX)."""
    kernels = library()
    return kernels is not None and bool(kernels.use_tiles(1))


def _folders() -> list[Path]:
    return [build.SOURCE.parent, home() / "kernels"]


def _installed(target: str) -> Path | None:
    name = build.file_name(target)
    return next((folder / name for folder in _folders() if (folder / name).exists()), None)


def _compiled(target: str) -> Path | None:
    if build.compiler() is None:
        log.info("no C compiler: encoding runs on torch's operations, which are slower")
        return None
    folder = next((folder for folder in _folders() if os.access(folder, os.W_OK)), _folders()[-1])
    try:
        return build.compile_library(target, folder)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("kernels.c was not compiled, encoding runs on torch's operations: %s", error)
        return None


# Rows of 8 bits hold one step somewhere, with hardly an exception; rows with a larger smallest number are still found.
_LARGEST_SMALLEST_STEP = 3


@cache
def panel_columns() -> int:
    """Number of columns of a panel, NR in kernels.c."""
    kernels = library()
    assert kernels is not None
    return kernels.panel_columns()


def panels_of(weight: Tensor) -> Tensor:
    """A weight [n, k], float32 or bfloat16, in panels of its precision, [ceil(n / NR), k, NR], padded with zeros.

    In bfloat16, the columns of the two halves of a panel alternate.
    """
    panels = _panels(weight)
    if weight.dtype == torch.bfloat16:
        panels = panels.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)  # [panels, k, NR / 2, 2]
    return panels.contiguous()


def tiles_of(weight: Tensor) -> Tensor:
    """Round a weight [n, k] to bfloat16 and lay it out as tile registers are loaded: [panels, ceil(k / 32), 2, 16, 32].

    A panel has 32 columns in two tiles. A row of a tile has a pair of inputs of each of its 16 columns.
    """
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, -k % 32, 0, -n % 32))
    # [panels, tile, column, step, pair, one of the pair] -> [panels, step, tile, pair, column, one of the pair]
    return padded.view(-1, 2, 16, padded.shape[1] // 32, 16, 2).permute(0, 3, 1, 4, 2, 5).flatten(4).contiguous()


def weight_of_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """Return the bfloat16 weight [n, k] that tiles were made of."""
    columns = tiles.unflatten(4, (16, 2)).permute(0, 2, 4, 1, 3, 5)  # the reverse of `tiles_of`
    return columns.reshape(len(tiles) * 32, -1)[:n, :k].contiguous()


def int8_panels_of(weight: Tensor) -> Tensor | None:
    """Panels of 8 bits, int8 [ceil(n / NR), 4 + k, NR], from which `weight_of` gives a weight [n, k] to the bit.

    None unless every row is whole steps of one size, from -127 to 127, as in a file that stores rows in 8 bits. The
    first four rows of a panel are the float32 step of each column.
    """
    magnitudes = weight.abs()
    step = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(1).nan_to_num(posinf=1.0)  # of most rows; [n]
    largest = magnitudes.amax(1)
    steps, left = torch.empty_like(weight, dtype=torch.int8), torch.arange(len(weight))
    for divisor in range(1, _LARGEST_SMALLEST_STEP + 1):
        if bool((largest[left] > 127.5 * step[left] / divisor).any()):
            return None
        trial = step[left] / divisor
        rounded = (weight[left] / trial[:, None]).round()
        fits = (rounded * trial[:, None] == weight[left]).all(1)
        steps[left[fits]], step[left[fits]] = rounded[fits].to(torch.int8), trial[fits]
        left = left[~fits]
        if not len(left):
            sizes = torch.nn.functional.pad(step, (0, -len(step) % panel_columns()))
            sizes = sizes.view(-1, 1, panel_columns()).view(torch.int8)  # [panels, 1, 4 NR]
            return torch.cat((sizes.view(-1, 4, panel_columns()), _panels(steps)), dim=1).contiguous()
    return None


def _panels(weight: Tensor) -> Tensor:
    columns = panel_columns()
    n, k = weight.shape
    return torch.nn.functional.pad(weight, (0, 0, 0, -n % columns)).view(-1, columns, k).transpose(1, 2)


def weight_of(panels: Tensor, n: int) -> Tensor:
    """The weight [n, k] that panels were made of: in their precision, or float32 for 8 bits."""
    if panels.dtype == torch.int8:
        sizes = panels[:, :4].contiguous().view(len(panels), -1).view(torch.float32)  # [panels, NR]
        panels = panels[:, 4:].float() * sizes[:, None]
    if panels.dtype == torch.bfloat16:
        panels = panels.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n].contiguous()


def describe(weight: Tensor, n: int, k: int, bias: Tensor | None, terms: int = 0) -> LinearWeight:
    """Arguments of a linear layer with n outputs of k inputs.

    Args:
        weight: panels [panels, k, NR], tiles as from `tiles_of`, or a contiguous float32 weight [n, k]. The caller
            keeps it and the bias alive.
        terms: bfloat16 terms that an input is split into, for products in bfloat16; 0 for products in float32.
    """
    kind = {2: ROW_MAJOR, 5: TILES}.get(weight.dim(), _KINDS[weight.dtype])
    return LinearWeight(weight.data_ptr(), None if bias is None else bias.data_ptr(), n, k, kind, terms)


def linear(x: Tensor, weight: Tensor, n: int, bias: Tensor | None, terms: int = 0) -> Tensor:
    """x [T, k] @ weight.T + bias: float32 [T, n]. `weight` as in `describe`. The bits of a row depend on it alone."""
    kernels = library()
    assert kernels is not None
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape[0], n)
    arguments = ctypes.byref(describe(weight, n, x.shape[1], bias, terms))
    memory = torch.empty(kernels.linear_floats(arguments))
    kernels.linear(arguments, x.shape[0], x.data_ptr(), out.data_ptr(), memory.data_ptr())
    return out


def quantise_rows(x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate x [T, k] in blocks of 64 by a Hadamard matrix and round it to 8 bits.

    Args:
        x: k is a multiple of 64.
        signs: factor of each number of a block before the rotation, float32 [64]: a sign divided by 8.

    Returns:
        uint8 [T, k] with zero point 128, and the size of a step of each row, float32 [T].
    """
    kernels = library()
    assert kernels is not None
    x = x.contiguous()
    steps, sizes = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0])
    memory = torch.empty(x.shape[1])
    kernels.quantise_rows(
        *x.shape, x.data_ptr(), signs.data_ptr(), steps.data_ptr(), sizes.data_ptr(), memory.data_ptr()
    )
    return steps, sizes


def rescale_rows(out: Tensor, sizes: Tensor, bias: Tensor | None) -> Tensor:
    """Return out [T, n] * sizes [T] + bias [n], computed in place."""
    kernels = library()
    assert kernels is not None
    pointer = None if bias is None else bias.data_ptr()
    kernels.rescale_rows(*out.shape, sizes.data_ptr(), pointer, out.data_ptr())
    return out
