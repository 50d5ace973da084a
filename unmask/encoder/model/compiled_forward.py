"""The forward of a `Decoder` in one call to the compiled kernels, for float32 on a CPU without gradients."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.encoder.model.architectures import Rope, Shape
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear
from unmask.encoder.runtime.threads import run_parts

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # as in kernels.c
_LINEARS = ("qkv", "out", "gate_up", "down")
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "attention_out_norm", "mlp_out_norm")

# (rope, length) -> cos and sin of each position, float32 [at least length, D/2]
AnglesOf = Callable[[Rope, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StackWeights:
    """Weights of a decoder stack.

    Attributes:
        embedding: float32 [vocabulary, W].
        linears: of each layer, by the names in `_LINEARS`.
        norms: of each layer, by the names in `_NORMS`: float32 factors, offset included; None where there is no norm.
        reaches: of each layer, the farthest distance that is attended to; None for any.
        final_norm: float32 [W].
    """

    embedding: Tensor
    linears: Sequence[dict[str, Linear]]
    norms: Sequence[dict[str, Tensor | None]]
    reaches: Sequence[int | None]
    final_norm: Tensor


class CompiledForward:
    """Hidden states of packs, with the weights as they were when this was made. May be called from several threads.

    A pack that is computed alone is divided among the cores. The vectors have the same bits either way.
    """

    def __init__(self, shape: Shape, causal: bool, weights: StackWeights, angles_of: AnglesOf) -> None:
        library = kernels.library()
        assert library is not None
        self._library, self._shape, self._angles_of = library, shape, angles_of
        self._ropes = list(dict.fromkeys(shape.ropes))
        self._tensors: list[Tensor] = []  # keeps the memory alive that the structures point to
        layers = (kernels.LayerWeights * shape.layers)()
        for index in range(shape.layers):
            layer = layers[index]
            for name in _LINEARS:
                setattr(layer, name, self._linear(weights.linears[index][name]))
            for name in _NORMS:
                norm = weights.norms[index][name]
                setattr(layer, name, None if norm is None else self._pointer(norm))
            reach = weights.reaches[index]
            layer.reach = -1 if reach is None else reach
            layer.rope = self._ropes.index(shape.ropes[index])
        self._layers = layers
        self._model = kernels.ModelArguments(
            hidden=shape.hidden_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate_size,
            activation=_ACTIVATIONS[shape.activation],
            causal=causal,
            num_layers=shape.layers,
            eps=shape.eps,
            attention_scale=shape.attention_scale,
            softcap=shape.softcap or 0.0,
            embedding_scale=shape.embedding_scale,
            embedding=self._pointer(weights.embedding),
            final_norm=self._pointer(weights.final_norm),
            layers=ctypes.addressof(layers),
        )

    def _pointer(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linear: Linear) -> kernels.LinearWeight:
        weight = linear.stored_weight().contiguous()
        bias = None if linear.bias is None else linear.bias.detach()
        self._tensors += [weight] if bias is None else [weight, bias]
        return kernels.describe(weight, linear.out_features, linear.in_features, bias, linear.terms)

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids [T] and the lengths of their sequences -> final hidden states, float32 [T, W]."""
        model, max_seqlen, tokens = ctypes.byref(self._model), max(lengths), len(ids)
        ids = ids.long().contiguous()
        if tokens and not 0 <= int(ids.min()) <= int(ids.max()) < self._shape.vocabulary:
            raise IndexError(f"token ids must lie in 0 to {self._shape.vocabulary - 1}")
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        angles = [self._angles_of(rope, max_seqlen) for rope in self._ropes]
        x = torch.empty(tokens, self._shape.hidden_size)
        shared = torch.empty(self._library.shared_floats(model, tokens))
        private = self._library.private_floats(model, max_seqlen)
        pointers: Any = ctypes.c_void_p * 2
        pack = kernels.Pack(
            tokens=tokens,
            sequences=len(lengths),
            max_seqlen=max_seqlen,
            ids=ids.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(),
            cosines=pointers(*(cos.data_ptr() for cos, _ in angles)),
            sines=pointers(*(sin.data_ptr() for _, sin in angles)),
            x=x.data_ptr(),
            shared=shared.data_ptr(),
        )

        def run(part: int, parts: int) -> None:
            self._library.forward(model, ctypes.byref(pack), part, parts)

        def reserve(parts: int) -> Tensor:
            memory = torch.empty(private * parts)
            pack.private = memory.data_ptr()
            return memory

        run_parts(run, reserve)
        return x
