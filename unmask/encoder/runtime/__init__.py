"""Running packs on a device: CPU and CUDA runtimes, batch-invariant linear layers, 8-bit weights."""

import torch
from torch import nn

from unmask.encoder.runtime.cpu import CpuRuntime
from unmask.encoder.runtime.cuda import CudaRuntime
from unmask.encoder.runtime.protocols import Runtime

__all__ = ["CpuRuntime", "CudaRuntime", "Runtime", "runtime_for"]


def runtime_for(decoder: nn.Module, pooling: str, device: torch.device) -> Runtime:
    """Return the runtime for a device: CUDA graphs and pinned transfers on CUDA, eager forwards elsewhere.

    Args:
        decoder: a `DecoderLike`. Off CUDA, calling it is enough.
        pooling: one of POOLINGS.
        device: of the decoder's weights.
    """
    runtime = CudaRuntime if device.type == "cuda" else CpuRuntime
    return runtime(decoder, pooling, device)
