"""Low-rank adapters on the decoder's fused layers, saved in PEFT's format.

A layer computes y = W x with W = W0 + scale * B A (LoRA, arXiv 2106.09685). Frameworks usually add the two paths at
run time: two more GEMMs and an addition per layer in the forward, four GEMMs in the backward. Where no adapter
dropout stands between them, the sum is formed once per step instead, so that the forward costs what the bare model's
does; the gradients of A and B follow from the layer's input and output gradient without ever forming that of W:

    z = x A^T  [T, r]        dB = scale * dy^T z       dA = scale * (dy B)^T x       dx = dy W
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.checkpoint.adapter import Adapter
from unmask.disk import atomic_write, umask_mode
from unmask.encoder.model.architectures import Shape
from unmask.encoder.model.decoder import Decoder
from unmask.errors import AdapterMismatch
from unmask.training.recipe import Lora
from unmask.training.sharding import unshard


class LoraLinear(nn.Module):
    """A frozen, possibly fused linear layer with one low-rank adapter per hub module it was fused from.

    Args:
        linear: the layer; its weight stays as it is.
        parts: hub name and first and last row of each adapted module inside `linear`.
        lora: rank, alpha, dropout.
        dtype: precision of the GEMMs.
        unmerged: never merge the adapter into the weight; for weights that are sharded over processes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        parts: list[tuple[str, int, int]],
        lora: Lora,
        dtype: torch.dtype,
        unmerged: bool = False,
    ) -> None:
        super().__init__()
        self.unmerged = unmerged
        self.parts, self.rank, self.scale, self.dropout = parts, lora.rank, lora.alpha / lora.rank, lora.dropout
        weight = linear.weight.detach()  # [out, in]
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        if unmerged:
            self.frozen = nn.Parameter(weight.to(dtype), requires_grad=False)  # only parameters are split
        else:
            self.frozen = weight.float()
            self.weight = weight.to(dtype, copy=True)  # W0 + scale * B A, refreshed by `merge`
        # PEFT's initialisation: A uniform like a linear layer's, B zero, so that training starts at the base model.
        self.down = nn.Parameter(torch.empty(len(parts) * lora.rank, weight.shape[1], device=weight.device))
        for block in self.down.data.split(lora.rank):
            nn.init.kaiming_uniform_(block, a=5**0.5)
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(stop - start, lora.rank, device=weight.device)) for _, start, stop in parts
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Merge A and B into W. Call it after every change of A or B."""
        if self._is_unmerged():
            return
        merged = self.frozen.clone()
        for (_, start, stop), a, b in zip(self.parts, self.down.split(self.rank), self.up, strict=True):
            merged[start:stop].addmm_(b, a, alpha=self.scale)
        self.weight.copy_(merged)

    def _is_unmerged(self) -> bool:
        return self.unmerged or bool(self.dropout and self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self._is_unmerged():
            y = F.linear(x, self.frozen.to(x.dtype), self.bias)
            z = F.linear(F.dropout(x, self.dropout, self.training), self.down.to(x.dtype))  # [T, parts * r]
            added = [torch.zeros_like(y[:, :0])]
            row = 0
            for (_, start, stop), z_part, b in zip(self.parts, z.split(self.rank, dim=1), self.up, strict=True):
                added += [y.new_zeros(len(y), start - row), F.linear(z_part, b.to(x.dtype)) * self.scale]
                row = stop
            return y + torch.cat([*added, y.new_zeros(len(y), y.shape[1] - row)], dim=1)
        spans = [(start, stop) for _, start, stop in self.parts]
        return _Merged.apply(x, self.down, self.weight, self.bias, self.scale, spans, *self.up)  # pyright: ignore[reportReturnType]


class _Merged(torch.autograd.Function):
    """y = x W^T with W already summed, and gradients for x, A and the Bs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        spans: list[tuple[int, int]],
        *up: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, down, weight, *up)
        ctx.scale, ctx.spans = scale, spans
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, down, weight, *up = ctx.saved_tensors
        rank = up[0].shape[1]
        z = x @ down.to(x.dtype).T  # [T, parts * r]
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        through, d_up = [], []
        for (start, stop), z_part, b in zip(ctx.spans, z.split(rank, dim=1), up, strict=True):
            part = dy[:, start:stop]  # [T, rows]
            d_up.append((part.T @ z_part).float() * ctx.scale)  # [rows, r]
            through.append(part @ b.to(dy.dtype))  # [T, r]
        d_down = (torch.cat(through, dim=1).T @ x).float() * ctx.scale  # [parts * r, in]
        return dx, d_down, None, None, None, None, *d_up


def add_lora(decoder: Decoder, lora: Lora, dtype: torch.dtype, unmerged: bool = False) -> list[LoraLinear]:
    """Freeze the decoder, put adapters on the linear layers that `lora.targets` names, and set the rest to `dtype`.

    Returns:
        The adapted layers, whose `down` and `up` are all that is left to train, in float32.
    """
    decoder.requires_grad_(False)
    adapted: list[LoraLinear] = []
    for index, layer in enumerate(decoder.layers):
        for field, parts in parts_of(decoder.shape, index, lora.targets).items():
            # Built before the decoder is rounded: W0 stays as the checkpoint has it.
            adapted.append(LoraLinear(getattr(layer, field), parts, lora, dtype, unmerged))
            setattr(layer, field, None)
    decoder.to(dtype)
    waiting = iter(adapted)
    for layer in decoder.layers:
        for field in ("qkv", "out", "gate_up", "down"):
            if getattr(layer, field) is None:
                setattr(layer, field, next(waiting))
    for linear in adapted:
        linear.merge()
    return adapted


def parts_of(shape: Shape, index: int, targets: list[str]) -> dict[str, list[tuple[str, int, int]]]:
    """Map each fused layer of a block to its targeted hub modules: name, first row, one past the last row."""
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "qkv": {"self_attn.q_proj": query, "self_attn.k_proj": value, "self_attn.v_proj": value},
        "out": {"self_attn.o_proj": shape.hidden_size},
        "gate_up": {"mlp.gate_proj": shape.intermediate_size, "mlp.up_proj": shape.intermediate_size},
        "down": {"mlp.down_proj": shape.hidden_size},
    }
    layers: dict[str, list[tuple[str, int, int]]] = {}
    for field, modules in sizes.items():
        row = 0
        for module, rows in modules.items():
            if module.rpartition(".")[2] in targets:
                layers.setdefault(field, []).append((f"layers.{index}.{module}", row, row + rows))
            row += rows
    return layers


def adapter_tensors(adapted: list[LoraLinear]) -> dict[str, Tensor]:
    """Return A and B of every module, unsharded, under the names of LLM2Vec's published adapters (an inner model's)."""
    return dict(_named_halves(adapted))


def _named_halves(adapted: list[LoraLinear]) -> Iterator[tuple[str, Tensor]]:
    for linear in adapted:
        for (module, _, _), a, b in zip(linear.parts, unshard(linear.down).split(linear.rank), linear.up, strict=True):
            yield f"base_model.model.{module}.lora_A.weight", a
            yield f"base_model.model.{module}.lora_B.weight", unshard(b)


@torch.no_grad()
def load_adapter(adapted: list[LoraLinear], adapter: Adapter, lora: Lora) -> None:
    """Copy A and B from an adapter that was trained before. The layers then compute what it made of its base.

    Raises:
        AdapterMismatch: it has other modules, another rank or other shapes than this run's.
    """
    modules = {module for linear in adapted for module, _, _ in linear.parts}
    odd = sorted(modules.symmetric_difference(adapter.modules))
    if odd:
        holder = "only the run" if odd[0] in modules else f"only {adapter.folder}"
        raise AdapterMismatch(
            f"lora.init_from: {adapter.folder} and this run adapt different modules: {holder} adapts {odd[0]}; "
            "make lora.targets those of the adapter"
        )
    for linear in adapted:
        for (module, _, _), a, b in zip(linear.parts, linear.down.split(linear.rank), linear.up, strict=True):
            start_a, start_b = adapter.halves(module)
            if (start_a.shape, start_b.shape) != (a.shape, b.shape):
                raise AdapterMismatch(
                    f"lora.init_from: {module} in {adapter.folder} has rank {len(start_a)} and shapes "
                    f"A {tuple(start_a.shape)}, B {tuple(start_b.shape)}; this run's are A {tuple(a.shape)}, "
                    f"B {tuple(b.shape)} at lora.rank = {lora.rank}"
                )
            a.copy_(start_a)
            b.copy_(start_b / linear.scale)  # the adapter's own scale is within its B
        linear.merge()


def write_adapter(folder: Path, halves: Mapping[str, Tensor], lora: Lora, base: str, dtype: torch.dtype) -> None:
    """Write the adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        halves: from `adapter_tensors`.

    Raises:
        StorageError: the folder cannot be written; no half-written file is left.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {name: tensor.to(dtype).contiguous().cpu() for name, tensor in halves.items()}
    with atomic_write(folder / "adapter_model.safetensors") as partial:
        try:
            with umask_mode(partial):
                save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # its writer's own, when the disk is full
            raise OSError(str(error)) from error
    with atomic_write(folder / "adapter_config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
