"""The contracts between the encoder, a runtime and a decoder."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from unmask.encoder.model.attention import PackLayout
from unmask.encoder.prompts import Prompt

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Runtime(Protocol):
    """Runs packs of one decoder on one kind of device. May be called from several threads.

    Attributes:
        prefetches: the host is free while the device computes, so the next texts should be tokenised meanwhile.
    """

    prefetches: bool

    def pooled_states(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Forward and pooling of one pack: float32 [N, W], in its order."""
        ...

    def map_packs(self, function: Callable[[_Item], _Result], packs: Sequence[_Item]) -> list[_Result]:
        """Return `function` of every pack, in order, as many at the same time as suit the device."""
        ...

    def allow_weight_changes(self) -> None:
        """Read the decoder's parameters anew at every forward from now on: they may be changed or moved."""
        ...


class DecoderLike(Protocol):
    """The methods of a decoder that a runtime calls; `Decoder` and `TransformersDecoder` have them."""

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids [T] and the lengths of their sequences -> hidden states [T, W]."""
        ...

    def forward_pack(self, ids: Tensor, positions: Tensor, layout: PackLayout) -> Tensor:
        """ids [T], positions [T] and the layout of their pack -> hidden states [T, W]."""
        ...

    def can_capture(self) -> bool:
        """True if a captured `forward_pack` can serve packs with other lengths, read from `layout.cu_seqlens`."""
        ...
