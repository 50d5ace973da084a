"""The forward: one decoder stack, bidirectional, over sequences laid end to end without padding.

Dimension letters, used in every shape comment:
    T  tokens in the pack, all sequences together      W  hidden size, the width of the residual stream
    H  query heads        K  key-value heads           D  size of a head        I  intermediate size of the MLP
    N  sequences of one length, or of the pack         L  tokens of a sequence

A pack of three sequences, from token ids to vectors:

    pack         a a a a | b b b b | c c c c c c c      input_ids [T], cu_seqlens [0, 4, 8, 15]
                 |             |             |
    embedding, norms, linear layers: per token          [T, W]; sequences do not matter
                 |             |             |
    attention    a x a,  b x b |  c x c                 groups of equal length: [2, H, 4, D] and [1, H, 7, D],
                 |             |             |          or one variable-length kernel over [T, H, D]
    hidden states                                       [T, W]
                 |             |             |
    pool         mean of the  mean of the  mean of the
                 pooled a     pooled b     pooled c     vectors [3, W]

Only attention uses the borders of sequences. The same code trains and serves: it is an ordinary `nn.Module` whose
parameters are fused (query+key+value, gate+up) and can take gradients.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.checkpoint.tensors import UNQUANTISED, TensorSource
from unmask.encoder.model import attention, fused_autograd
from unmask.encoder.model.architectures import Rope, Shape
from unmask.encoder.model.attention import LengthGroup, PackLayout
from unmask.encoder.model.compiled_forward import CompiledForward, StackWeights
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear
from unmask.errors import CheckpointError


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def factor(self) -> Tensor:
        """Return the factor of the normalised states, float32 [size]."""
        return self.weight.float() + self.offset if self.offset else self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.factor()
        if torch.is_grad_enabled():
            return fused_autograd.RmsNorm.apply(x, scale, self.eps)  # pyright: ignore[reportReturnType]
        return F.rms_norm(x.float(), (x.shape[-1],), scale, self.eps).to(self.weight.dtype)


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each added to the residual stream."""

    def __init__(self, shape: Shape, window: int | None, causal: bool = False) -> None:
        super().__init__()
        self.shape, self.window, self.causal = shape, window, causal
        self.attention_dropout = 0.0  # in training mode only
        heads = shape.heads + 2 * shape.kv_heads

        def norm(size: int) -> Norm:
            return Norm(size, shape.eps, shape.norm_offset)

        self.attention_norm = norm(shape.hidden_size)
        self.qkv = Linear(shape.hidden_size, heads * shape.head_dim, bias=shape.qkv_bias)
        self.out = Linear(shape.heads * shape.head_dim, shape.hidden_size, bias=shape.out_bias)
        self.mlp_norm = norm(shape.hidden_size)
        self.gate_up = Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=shape.mlp_bias)
        self.down = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.q_norm = norm(shape.head_dim) if shape.qk_norm else None
        self.k_norm = norm(shape.head_dim) if shape.qk_norm else None
        self.attention_out_norm = norm(shape.hidden_size) if shape.sandwich_norm else None
        self.mlp_out_norm = norm(shape.hidden_size) if shape.sandwich_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout) -> Tensor:
        """x [T, W]; cos, sin [T, 1, D/2] -> [T, W]."""
        attended = self.attend(self.attention_norm(x), cos, sin, layout)  # [T, W]
        x = add_residual(x, self.attention_out_norm(attended) if self.attention_out_norm else attended)
        transformed = self.mlp(self.mlp_norm(x))  # [T, W]
        return add_residual(x, self.mlp_out_norm(transformed) if self.mlp_out_norm else transformed)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout) -> Tensor:
        """x [T, W]; cos, sin [T, 1, D/2] -> [T, W]. Each token attends to the tokens of its own sequence."""
        s = self.shape
        heads = self.qkv(x).view(x.shape[0], s.heads + 2 * s.kv_heads, s.head_dim)  # [T, H+2K, D]
        qk, v = heads.split((s.heads + s.kv_heads, s.kv_heads), dim=1)  # [T, H+K, D], [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((s.heads, s.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((s.heads, s.kv_heads), dim=1)  # [T, H, D], [T, K, D]
        has_dropout = self.training and self.attention_dropout > 0
        if layout.cu_seqlens is not None and not has_dropout and attention.kernel_supports(q.dtype, s.softcap):
            return self.out(self._attend_pack(q, k, v, layout.cu_seqlens, layout.max_seqlen).flatten(1))
        # One split instead of a slice per group: the gradient of each slice would be as large as the whole pack.
        sizes = [count * length for _, count, length in layout.groups]
        heads_of_groups = zip(layout.groups, *(x.split(sizes) for x in (q, k, v)), strict=True)
        parts = [self._attend_group(q, k, v, group) for group, q, k, v in heads_of_groups]
        return self.out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def linears(self) -> dict[str, Linear]:
        """Return the linear layers by name."""
        return {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}

    def norm_factors(self) -> dict[str, Tensor | None]:
        """Return the factors of every norm that a layer may have, by name; None for those that this one lacks."""
        names = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "attention_out_norm", "mlp_out_norm")
        norms = {name: getattr(self, name) for name in names}
        return {name: None if norm is None else norm.factor().detach() for name, norm in norms.items()}

    @property
    def reach(self) -> int | None:
        """Farthest distance of a token that is attended to; None for any."""
        return None if self.window is None else self._reach(self.window)

    def _attend_pack(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """q [T, H, D]; k, v [T, K, D]; cu_seqlens [N+1] -> [T, H, D]."""
        kernel = attention.varlen_kernel()
        assert kernel is not None
        reach = -1 if self.reach is None else self.reach  # -1: no limit
        window = (reach, 0 if self.causal else reach)
        return kernel(q, k, v, cu_seqlens, max_seqlen, self.shape.attention_scale, window, self.shape.softcap or 0.0)

    def _reach(self, window: int) -> int:
        # transformers counts the token itself in a causal window, and not in a bidirectional one.
        return window - 1 if self.causal else window

    def _attend_group(self, q: Tensor, k: Tensor, v: Tensor, group: LengthGroup) -> Tensor:
        """q [N*L, H, D]; k, v [N*L, K, D] -> [N*L, H*D]."""
        _, count, length = group
        # [N*L, heads, D] -> [N, heads, L, D]
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(length, q.device)
        scale, softcap = self.shape.attention_scale, self.shape.softcap
        if softcap is not None:
            out = attention.softcapped_attention(q, k, v, mask, scale, softcap)
        elif mask is None and self._trains_on_cpu(q):
            out = attention.grouped_query_attention(q, k, v, scale)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.attention_dropout if self.training else 0.0,
                is_causal=self.causal and mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.transpose(1, 2).flatten(0, 1).flatten(1)  # [N*L, H*D]

    def _trains_on_cpu(self, q: Tensor) -> bool:
        has_dropout = self.training and self.attention_dropout > 0
        return q.requires_grad and q.device.type == "cpu" and not self.causal and not has_dropout

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """bool [L, L], True where query i may see key j. None if all may, or if the kernel's causal mask is enough."""
        reach = self._reach(length if self.window is None else self.window)
        if length <= reach + 1 and not (self.causal and self.shape.softcap is not None):
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]  # [L, L]
        return (distance <= reach) & (distance >= (0 if self.causal else -reach))

    def mlp(self, x: Tensor) -> Tensor:
        """x [T, W] -> [T, W], in place where no gradient needs the intermediate values."""
        gate_up = self.gate_up(x)  # [T, 2 I]
        if torch.is_grad_enabled() and self.shape.activation == "silu":
            return self.down(fused_autograd.SwiGlu.apply(gate_up))  # [T, W]
        gate, up = gate_up.chunk(2, dim=-1)  # [T, I] twice
        inference = not torch.is_grad_enabled()
        gate = F.silu(gate, inplace=inference) if self.shape.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate.mul_(up) if inference else gate * up)  # [T, W]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by the angle of its position, in place when no gradient needs x.

    x [T, heads, D]; cos, sin [T, 1, D/2].
    """
    if torch.is_grad_enabled():
        return fused_autograd.Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]
    first, second = x.chunk(2, dim=-1)  # [T, heads, D/2] twice
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
    return x


@cache
def round_to(value: float, dtype: torch.dtype) -> float:
    """Round a Python float to a precision. Cached, because a tensor would be sent to the GPU at every forward."""
    return torch.tensor(value, dtype=dtype).item()


def add_residual(x: Tensor, update: Tensor) -> Tensor:
    """x + update, in the memory of one of them when no gradient needs it. New memory costs as much as the addition."""
    if torch.is_grad_enabled():
        return x + update
    return update.add_(x) if update.dtype == x.dtype else x.add_(update)


class Decoder(nn.Module):
    """A decoder-only transformer with its causal mask removed. `causal` keeps the mask, for comparison."""

    def __init__(self, shape: Shape, causal: bool = False) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        # Without a weight, nn.Embedding draws a random one, for which torch imports its compiler: 150 MB, and seconds.
        weight = torch.empty(shape.vocabulary, shape.hidden_size)
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Layer(shape, window, causal) for window in shape.windows)
        self.norm = Norm(shape.hidden_size, shape.eps, shape.norm_offset)
        self.checkpointing = False  # recompute a layer's activations in the backward instead of keeping them
        self._angles: dict[tuple[Rope, int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the final hidden states of a pack.

        Args:
            ids: token ids of all sequences end to end, [T].
            lengths: tokens of each sequence, summing to T. Keep equal lengths together: they share a kernel call.

        Returns:
            [T, W], after the final norm, in the weights' precision.
        """
        groups = attention.length_groups(lengths)
        positions = torch.cat([torch.arange(length, device=ids.device).repeat(n) for _, n, length in groups])  # [T]
        has_kernel = attention.has_varlen_kernel(ids.device)
        cu_seqlens = attention.cu_seqlens_of(lengths, ids.device) if has_kernel else None
        return self.forward_pack(ids, positions, PackLayout(groups, cu_seqlens, max(lengths)))

    def forward_pack(self, ids: Tensor, positions: Tensor, layout: PackLayout) -> Tensor:
        """Forward with precomputed positions [T]. Performs no host-device synchronisation.

        It can therefore be captured in a CUDA graph, if `can_capture`. Tokens behind the last sequence are allowed
        where a kernel reads `cu_seqlens`; their states have no meaning.
        """
        x = self.embedding(ids)  # [T, W]
        if self._keeps_residual(x):
            x = x.float()
        if self.shape.embedding_scale != 1.0:
            x = x * round_to(self.shape.embedding_scale, x.dtype)
        rotations = {
            rope: self._rotation(rope, positions, layout.max_seqlen, self.norm.weight.dtype)
            for rope in set(self.shape.ropes)
        }
        for layer, rope in zip(self.layers, self.shape.ropes, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *rotations[rope], layout, use_reentrant=False)
            else:
                x = layer(x, *rotations[rope], layout)
        return self.norm(x)

    @staticmethod
    def _keeps_residual(x: Tensor) -> bool:
        """True if the residual stream is float32 between products in bfloat16: on a CPU, where memory is cheap."""
        return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()

    def compiled_forward(self) -> CompiledForward | None:
        """Return this forward as one call to the compiled kernels, with the present weights. None where that cannot be.

        They compute float32 on a CPU, from layers as this class makes them.
        """
        if kernels.library() is None or len(set(self.shape.ropes)) > 2 or not all(map(_is_plain, self.modules())):
            return None
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        linears = [layer.linears() for layer in layers]
        if len(layers) < len(self.layers) or not all(_is_readable(x) for group in linears for x in group.values()):
            return None
        weights = StackWeights(
            embedding=self.embedding.weight.detach(),
            linears=linears,
            norms=[layer.norm_factors() for layer in layers],
            reaches=[layer.reach for layer in layers],
            final_norm=self.norm.factor().detach(),
        )
        device = self.embedding.weight.device
        return CompiledForward(
            self.shape, self.causal, weights, lambda rope, length: self._angles_table(rope, length, device)
        )

    def can_capture(self) -> bool:
        """True if attention reads `cu_seqlens` from device memory; only then can a graph serve other lengths."""
        weight = self.embedding.weight
        return attention.has_varlen_kernel(weight.device) and attention.kernel_supports(
            weight.dtype, self.shape.softcap
        )

    def states_by_layer(self, ids: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """States [T, W] of decoders cut after the embedding, after the first layer, and so on, final norm included."""
        states: list[Tensor] = []
        hooks = [self.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(self.norm(inputs[0])))]
        hooks += [layer.register_forward_hook(lambda *call: states.append(self.norm(call[2]))) for layer in self.layers]
        try:
            self(ids, lengths)
        finally:
            for hook in hooks:
                hook.remove()
        yield from states

    def _rotation(self, rope: Rope, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin for each token, [T, 1, D/2]."""
        cos, sin = self._angles_table(rope, length, positions.device)
        return cos[positions].to(dtype).unsqueeze(1), sin[positions].to(dtype).unsqueeze(1)

    def _angles_table(self, rope: Rope, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the positions 0 to `length` and some more, float32 [positions, D/2]."""
        size = 1 << (length - 1).bit_length()  # a table for the next power of two, built once
        key = (rope, size, device)
        if key not in self._angles:
            with torch.inference_mode(False), torch.no_grad():  # training may need the table that serving built
                frequencies = rope.frequencies(self.shape.head_dim).to(device)
                angles = torch.outer(torch.arange(size, device=device).float(), frequencies)  # [size, D/2]
                self._angles[key] = (angles.cos(), angles.sin())
        return self._angles[key]

    @classmethod
    def load(
        cls, shape: Shape, tensors: TensorSource, dtype: torch.dtype, device: str, causal: bool = False
    ) -> "Decoder":
        """Build the model and fill it, one tensor at a time, converting each to `dtype`.

        Raises:
            CheckpointError: a tensor is missing, has another shape than the config says, or is left over.
        """
        with torch.device("meta"):
            decoder = cls(shape, causal)
        sources = decoder.sources()
        check_names(sources, tensors)
        for target, names in sources.items():
            module, _, name = target.rpartition(".")
            owner = decoder.get_submodule(module)
            # Not `Module.to_empty`, for which torch would import its symbolic shapes and sympy.
            parameter = nn.Parameter(torch.empty(owner.get_parameter(name).shape, dtype=dtype, device=device))
            with torch.no_grad():
                fill(parameter, names, tensors)
            setattr(owner, name, parameter)
        return decoder.eval()

    def sources(self) -> dict[str, list[str]]:
        """Return, for each of our parameters, the hub tensors stacked to make it, in order."""
        table = {"embedding.weight": ["embed_tokens.weight"], "norm.weight": ["norm.weight"]}
        sandwich = self.shape.sandwich_norm
        for i in range(self.shape.layers):
            hub = {
                "attention_norm": ["input_layernorm"],
                "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                "out": ["self_attn.o_proj"],
                "mlp_norm": ["pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"],
                "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
                "down": ["mlp.down_proj"],
                "q_norm": ["self_attn.q_norm"],
                "k_norm": ["self_attn.k_norm"],
                "attention_out_norm": ["post_attention_layernorm"],
                "mlp_out_norm": ["post_feedforward_layernorm"],
            }
            for name, _ in self.layers[i].named_parameters():
                module, kind = name.rsplit(".", 1)
                table[f"layers.{i}.{name}"] = [f"layers.{i}.{part}.{kind}" for part in hub[module]]
        return table


def _is_plain(module: nn.Module) -> bool:
    """True if a module runs no hooks and its own parameters are float32 on the CPU."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return not has_hooks and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in own)


def _is_readable(linear: nn.Module) -> bool:
    """True if the compiled kernels read a layer's weight as it is stored: no adapter, no 8 bits, not oneDNN's."""
    return type(linear) is Linear and not linear.stored_weight().is_mkldnn


def check_names(
    sources: Mapping[str, Sequence[str]], tensors: TensorSource, unused: Collection[str] = ("inv_freq",)
) -> None:
    """Check that a checkpoint has the tensors that a decoder is made of, and no others in its layers.

    Args:
        unused: regular expressions for names in a CausalLM's file of tensors that a forward does not read.

    Raises:
        CheckpointError: a tensor is missing, or the architecture has no place for one.
    """
    available = set(tensors.names())
    missing = [name for names in sources.values() for name in names if name not in available]
    if missing:
        raise CheckpointError(f"the weights lack {len(missing)} tensors, for example {missing[0]!r}")
    used = {name for names in sources.values() for name in names}
    extra = sorted(
        name
        for name in available - used
        if name.startswith("layers.") and not any(re.search(pattern, f"model.{name}") for pattern in unused)
    )
    if extra:
        raise CheckpointError(
            f"the weights hold {len(extra)} tensors this architecture has no place for, for example {extra[0]!r}; "
            f"the config does not describe them. If they are scales of quantised weights: {UNQUANTISED}"
        )


def fill(parameter: nn.Parameter, names: list[str], tensors: TensorSource) -> None:
    """Copy hub tensors into one parameter, stacked along the first axis.

    Raises:
        CheckpointError: they do not add up to the parameter's shape.
    """
    shapes = [tensors.shape(name) for name in names]
    rows = sum(shape[0] for shape in shapes if shape)
    if rows != parameter.shape[0] or any(shape[1:] != tuple(parameter.shape[1:]) for shape in shapes):
        listing = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        raise CheckpointError(
            f"wrong shape: {listing}; the config calls for {list(parameter.shape)} in all. "
            "The config belongs to other weights, or the file is damaged"
        )
    start = 0
    for name, shape in zip(names, shapes, strict=True):
        parameter[start : start + shape[0]].copy_(tensors.read(name))
        start += shape[0]
