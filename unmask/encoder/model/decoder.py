"""The forward: one decoder stack, bidirectional, over sequences laid end to end without padding.

Dimension letters, used in every shape comment:
    T  tokens in the pack, all sequences together      W  width of the residual stream
    H  query heads        K  key-value heads           D  size of a head        I  inner width of the MLP
    N  sequences of one length                         L  that length

Only attention needs to know where a sequence ends; everything else sees T tokens. The same code trains and serves:
it is an ordinary `nn.Module` whose parameters are fused (query+key+value, gate+up) and can take gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.model import attention as packed
from unmask.encoder.model import fused_autograd
from unmask.encoder.model.architectures import Rope, Shape
from unmask.encoder.runtime.linear import Linear
from unmask.errors import CheckpointError

Run = tuple[int, int, int]  # first token, number of sequences, their common length


@dataclass(frozen=True)
class PackLayout:
    """Where the sequences of a pack lie.

    Attributes:
        runs: neighbours of equal length.
        bounds: where each begins, int32 [N+1] on the device; None where no kernel takes a whole pack.
        longest: tokens of the longest.
    """

    runs: list[Run]
    bounds: Tensor | None
    longest: int


def length_groups(lengths: list[int]) -> list[Run]:
    """Neighbouring sequences of equal length, to be attended as one batch.

    >>> length_groups([4, 4, 7])
    [(0, 2, 4), (8, 1, 7)]
    """
    runs: list[Run] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() + self.offset if self.offset else self.weight.float()
        if torch.is_grad_enabled():
            return fused_autograd.RmsNorm.apply(x, scale, self.eps)  # pyright: ignore[reportReturnType]
        return F.rms_norm(x.float(), (x.shape[-1],), scale, self.eps).to(x.dtype)


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each on the residual stream."""

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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, spans: PackLayout) -> Tensor:
        """x [T, W]; cos, sin [T, 1, D/2] -> [T, W]."""
        attended = self.attend(self.attention_norm(x), cos, sin, spans)  # [T, W]
        x = added(x, self.attention_out_norm(attended) if self.attention_out_norm else attended)
        mixed = self.mlp(self.mlp_norm(x))  # [T, W]
        return added(x, self.mlp_out_norm(mixed) if self.mlp_out_norm else mixed)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, spans: PackLayout) -> Tensor:
        s = self.shape
        heads = self.qkv(x).view(x.shape[0], s.heads + 2 * s.kv_heads, s.head_dim)  # [T, H+2K, D]
        qk, v = heads.split((s.heads + s.kv_heads, s.kv_heads), dim=1)  # [T, H+K, D], [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((s.heads, s.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((s.heads, s.kv_heads), dim=1)  # [T, H, D], [T, K, D]
        dropped = self.training and self.attention_dropout > 0
        if spans.bounds is not None and not dropped and packed.takes(q.dtype, s.softcap):
            return self.out(self._attend_pack(q, k, v, spans.bounds, spans.longest).flatten(1))
        # Each run's heads by one split: the gradient of a slice would be as large as the whole pack.
        sizes = [count * length for _, count, length in spans.runs]
        heads_of_runs = zip(spans.runs, *(x.split(sizes) for x in (q, k, v)), strict=True)
        parts = [self._attend_run(q, k, v, run) for run, q, k, v in heads_of_runs]
        return self.out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _attend_pack(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """q [T, H, D]; k, v [T, K, D]; bounds [N+1] -> [T, H, D]."""
        attend = packed.kernel()
        assert attend is not None
        reach = -1 if self.window is None else self._reach(self.window)  # -1: no limit
        window = (reach, 0 if self.causal else reach)
        return attend(q, k, v, bounds, longest, self.shape.attention_scale, window, self.shape.softcap or 0.0)

    def _reach(self, window: int) -> int:
        # transformers counts the token itself in a causal window, and not in a bidirectional one.
        return window - 1 if self.causal else window

    def _attend_run(self, q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
        _, count, length = run
        # [N*L, heads, D] -> [N, heads, L, D]
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(length, q.device)
        if self.shape.softcap is None and mask is None and self._trains_on_cpu(q):
            out = grouped_attention(q, k, v, self.shape.attention_scale)
        elif self.shape.softcap is None:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.attention_dropout if self.training else 0.0,
                is_causal=self.causal and mask is None,
                scale=self.shape.attention_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            out = capped_attention(q, k, v, mask, self.shape.attention_scale, self.shape.softcap)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)  # [N*L, H*D]

    def _trains_on_cpu(self, q: Tensor) -> bool:
        dropped = self.training and self.attention_dropout > 0
        return q.requires_grad and q.device.type == "cpu" and not self.causal and not dropped

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """Which token [L] may see which [L]; None where all may, or where the kernel's own causal mask does."""
        reach = self._reach(length if self.window is None else self.window)
        if length <= reach + 1 and not (self.causal and self.shape.softcap is not None):
            return None
        position = torch.arange(length, device=device)
        behind = position[:, None] - position[None, :]  # [L, L]
        return (behind <= reach) & (behind >= (0 if self.causal else -reach))

    def mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)  # [T, 2 I]
        if torch.is_grad_enabled() and self.shape.activation == "silu":
            return self.down(fused_autograd.SwiGlu.apply(gate_up))  # [T, W]
        gate, up = gate_up.chunk(2, dim=-1)  # [T, I] twice
        serving = not torch.is_grad_enabled()  # then nobody needs the gate again, and its memory is at hand
        gate = F.silu(gate, inplace=serving) if self.shape.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate.mul_(up) if serving else gate * up)  # [T, W]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle, in place when no gradient needs x.

    x [T, heads, D]; cos, sin [T, 1, D/2].
    """
    if torch.is_grad_enabled():
        return fused_autograd.Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]
    first, second = x.chunk(2, dim=-1)  # [T, heads, D/2] twice
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return x


@cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """What a number is in this precision, without a tensor that would have to be sent to a GPU each time."""
    return torch.tensor(number, dtype=dtype).item()


def added(x: Tensor, update: Tensor) -> Tensor:
    """x + update, in the update's memory when no gradient needs it. Fresh memory costs as much as the sum."""
    return x + update if torch.is_grad_enabled() else update.add_(x)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by plain products, the query heads of one key head side by side.

    For training on a CPU: torch's fused kernel takes five times as long for the backward of short sequences.

    q [N, H, L, D]; k, v [N, K, L, D] -> [N, H, L, D].
    """
    kv_heads, length = k.shape[1], q.shape[2]
    q = q.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)  # [N*K, H/K*L, D]
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # [N*K, L, D]
    weights = (q @ k.transpose(1, 2) * scale).softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # [N*K, H/K*L, L]
    return (weights @ v).unflatten(1, (-1, length)).unflatten(0, (-1, kv_heads)).flatten(1, 2)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attention with scores squashed into (-cap, cap), as in Gemma 2 (arXiv 2408.00118).

    q [N, H, L, D]; k, v [N, K, L, D] -> [N, H, L, D].
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))  # [N, H, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


class Decoder(nn.Module):
    """A decoder-only transformer with its causal mask removed; `causal` leaves it in place, for comparison."""

    def __init__(self, shape: Shape, causal: bool = False) -> None:
        super().__init__()
        self.shape = shape
        # Given its weight, it draws no random one, for which torch would import its compiler: 150 MB, and seconds.
        self.embedding = nn.Embedding(
            shape.vocabulary, shape.hidden_size, _weight=torch.empty(shape.vocabulary, shape.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(shape, window, causal) for window in shape.windows)
        self.norm = Norm(shape.hidden_size, shape.eps, shape.norm_offset)
        self.checkpointing = False  # recompute a layer's activations in the backward instead of keeping them
        self._angles: dict[tuple[Rope, int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Final hidden states of a pack.

        Args:
            ids: token ids of all sequences end to end, [T].
            lengths: tokens of each sequence, summing to T. Keep equal lengths together: they share a kernel call.

        Returns:
            [T, W], after the final norm, in the weights' precision.
        """
        runs = length_groups(lengths)
        positions = torch.cat([torch.arange(length, device=ids.device).repeat(n) for _, n, length in runs])  # [T]
        bounds = packed.bounds_of(lengths, ids.device) if packed.on(ids.device) else None
        return self.through(ids, positions, PackLayout(runs, bounds, max(lengths)))

    def through(self, ids: Tensor, positions: Tensor, spans: PackLayout) -> Tensor:
        """As `forward`, for a pack whose tokens know their positions, [T]. Asks nothing of the processor.

        Tokens behind the last sequence are allowed where a kernel takes the whole pack; their states mean nothing.
        """
        x = self.embedding(ids)  # [T, W]
        if self.shape.embedding_scale != 1.0:
            x = x * rounded(self.shape.embedding_scale, x.dtype)
        rotations = {rope: self._rotation(rope, positions, spans.longest, x.dtype) for rope in set(self.shape.ropes)}
        for layer, rope in zip(self.layers, self.shape.ropes, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *rotations[rope], spans, use_reentrant=False)
            else:
                x = layer(x, *rotations[rope], spans)
        return self.norm(x)

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
        """cos and sin for each token, [T, 1, D/2]."""
        size, device = 1 << (length - 1).bit_length(), positions.device  # a table for the next power of two, built once
        key = (rope, size, device)
        if key not in self._angles:
            with torch.inference_mode(False), torch.no_grad():  # training may need the table that serving built
                frequencies = rope.frequencies(self.shape.head_dim).to(device)
                angles = torch.outer(torch.arange(size, device=device).float(), frequencies)  # [size, D/2]
                self._angles[key] = (angles.cos(), angles.sin())
        cos, sin = self._angles[key]
        return cos[positions].to(dtype).unsqueeze(1), sin[positions].to(dtype).unsqueeze(1)

    @classmethod
    def load(
        cls, shape: Shape, tensors: TensorSource, dtype: torch.dtype, device: str, causal: bool = False
    ) -> "Decoder":
        """Build the model and fill it, one tensor at a time, converting as it goes.

        Raises:
            CheckpointError: a tensor is missing, has another shape than the config says, or is left over.
        """
        with torch.device("meta"):
            decoder = cls(shape, causal)
        known = set(tensors.names())
        wanted = decoder.sources()
        missing = [name for names in wanted.values() for name in names if name not in known]
        if missing:
            raise CheckpointError(f"the weights lack {len(missing)} tensors, for example {missing[0]!r}")
        used = {name for names in wanted.values() for name in names}
        extra = sorted(name for name in known - used if name.startswith("layers.") and "inv_freq" not in name)
        if extra:
            raise CheckpointError(
                f"the weights hold {len(extra)} tensors this architecture has no place for, for example {extra[0]!r}; "
                "the config does not describe them"
            )
        for target, names in wanted.items():
            module, _, name = target.rpartition(".")
            owner = decoder.get_submodule(module)
            # Not `Module.to_empty`, for which torch would import its symbolic shapes and sympy.
            parameter = nn.Parameter(torch.empty(owner.get_parameter(name).shape, dtype=dtype, device=device))
            with torch.no_grad():
                fill(parameter, names, tensors)
            setattr(owner, name, parameter)
        return decoder.eval()

    def sources(self) -> dict[str, list[str]]:
        """For each of our parameters, the hub tensors stacked to make it, in order."""
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


def fill(parameter: nn.Parameter, names: list[str], tensors: TensorSource) -> None:
    """Copy hub tensors into one parameter, stacked along the first axis.

    Raises:
        CheckpointError: they do not add up to the parameter's shape.
    """
    shapes = [tensors.shape(name) for name in names]
    rows = sum(shape[0] for shape in shapes if shape)
    if rows != parameter.shape[0] or any(shape[1:] != tuple(parameter.shape[1:]) for shape in shapes):
        told = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        raise CheckpointError(
            f"wrong shape: {told}; the config calls for {list(parameter.shape)} in all. "
            "The config belongs to other weights, or the file is damaged"
        )
    start = 0
    for name, shape in zip(names, shapes, strict=True):
        parameter[start : start + shape[0]].copy_(tensors.read(name))
        start += shape[0]
