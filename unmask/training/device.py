"""Choose the device of a run and the precision of its forward."""

import os
import time
from functools import cache

import torch
import torch.nn.functional as F

from unmask.errors import UsageError


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose the precision of the forward. `auto` is bfloat16 if the device multiplies faster in it."""
    if precision == "auto":
        return torch.bfloat16 if _bfloat16_is_faster(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


@cache
def _bfloat16_is_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # oneDNN has bfloat16 GEMMs without these too, but emulated and slower than float32.
    if device.type != "cpu" or not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    # Having the instructions is not enough: AVX-512's bfloat16 takes twice the time of float32 on some processors
    # with two float32 units and one for bfloat16, where AMX takes a fifth.
    return _seconds_per_gemm(torch.bfloat16) < 0.8 * _seconds_per_gemm(torch.float32)


def _seconds_per_gemm(dtype: torch.dtype) -> float:
    """Measure a GEMM of a layer's shape in this precision: the fastest of six runs, in seconds."""
    x, weight = torch.zeros(512, 1024, dtype=dtype), torch.zeros(2048, 1024, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            F.linear(x, weight)
            best = min(best, time.perf_counter() - began)
    return best


def choose_device(name: str) -> torch.device:
    """Choose the device. `auto` is the accelerator of this process, if there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device
