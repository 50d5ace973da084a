"""The runtime for CPUs, and for every device without a runtime of its own: one eager forward per pack."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from unmask.encoder.pooling import pool
from unmask.encoder.prompts import Prompt
from unmask.encoder.runtime.threads import parallel_map

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class CpuRuntime:
    """Packs in parallel, one per core.

    Args:
        decoder: gives hidden states [T, W] of ids [T] and lengths.
        pooling: one of POOLINGS.
        device: of the decoder's weights.
    """

    prefetches = False  # tokenising in the background would take a core from the forwards

    def __init__(self, decoder: nn.Module, pooling: str, device: torch.device) -> None:
        self._decoder, self._pooling, self._device = decoder, pooling, device
        self._compiled, self._are_weights_fixed = _compile(decoder), True

    @torch.inference_mode()
    def pooled_states(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Pooled hidden states of a pack, float32 [N, W], in its order."""
        ids = torch.from_numpy(np.concatenate([prompt.ids for prompt in prompts])).to(self._device)  # [T]
        compiled = self._compiled if self._are_weights_fixed else _compile(self._decoder)
        hidden = (compiled or self._decoder)(ids, [len(prompt.ids) for prompt in prompts])  # [T, W]
        return pool(hidden, prompts, self._pooling).cpu().numpy()

    def map_packs(self, function: Callable[[_Item], _Result], packs: Sequence[_Item]) -> list[_Result]:
        """Return `function` of every pack, in order: several at once, each on one core."""
        return parallel_map(function, packs)

    def allow_weight_changes(self) -> None:
        """Read the parameters anew at every forward."""
        self._compiled, self._are_weights_fixed = None, False


def _compile(decoder: nn.Module) -> Callable[[Tensor, list[int]], Tensor] | None:
    """Return the decoder's forward in compiled kernels, which computes with its present weights.

    None where it has none.
    """
    compiled_forward = getattr(decoder, "compiled_forward", None)
    return None if compiled_forward is None else compiled_forward()
