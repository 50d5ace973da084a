"""Adapters as products B A: their weighted sum, the nearest one of a smaller rank, and how they are written.

The mean of the As times the mean of the Bs is another matrix than the mean of the products. A sum of products is itself
one, with the halves laid side by side, so sums and means of adapters are exact at the summed rank:

    B1 A1 + B2 A2 = [B1 B2] [A1; A2]
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unmask.disk import atomic_write, umask_mode
from unmask.errors import AdapterMismatch


@dataclass(frozen=True)
class Factors:
    """An adapter as a product B A for each module.

    Attributes:
        name: where it came from, for messages.
        base: what it was trained on top of.
        halves: A [rank, in] and B [out, rank] of each module, float32; the update is B A.
    """

    name: str
    base: str | None
    halves: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(a.shape[0] for a, _ in self.halves.values())


def weighted_sum(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Sum the products of adapters with weights, exactly: their halves lie side by side. A missing module counts as
    zero.

    Raises:
        AdapterMismatch: a module has different shapes.
    """
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    owners: dict[str, str] = {}
    for part, weight in zip(parts, weights, strict=True):
        for module, (a, b) in part.halves.items():
            if module not in halves:
                halves[module], owners[module] = (a, weight * b), part.name
                continue
            before_a, before_b = halves[module]
            if (before_b.shape[0], before_a.shape[1]) != (b.shape[0], a.shape[1]):
                raise AdapterMismatch(
                    f"{part.name} changes {module} by a {(b.shape[0], a.shape[1])} matrix, {owners[module]} by a "
                    f"{(before_b.shape[0], before_a.shape[1])} one; they were made for different models"
                )
            halves[module] = torch.cat((before_a, a)), torch.cat((before_b, weight * b), dim=1)
    return Factors("+".join(part.name for part in parts), parts[0].base, halves)


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Find the nearest adapter of a smaller rank (Eckart-Young), and the lost share of the update's Frobenius norm.

    The product is never formed: with B = Qb Rb and A^T = Qa Ra, the singular values of B A are those of the small
    Rb Ra^T.
    """
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    lost = total = 0.0
    for module, (a, b) in factors.halves.items():
        q_b, r_b = torch.linalg.qr(b.double())  # [out, R], [R, R]
        q_a, r_a = torch.linalg.qr(a.double().T)  # [in, R], [R, R]
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        halves[module] = (root[:, None] * v[:rank] @ q_a.T).float(), (q_b @ u[:, :rank] * root).float()
        lost += float(s[rank:].square().sum())
        total += float(s.square().sum())
    return Factors(factors.name, factors.base, halves), (lost / total) ** 0.5 if total else 0.0


def write_factors(folder: Path, factors: Factors, encoder_config: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's format, its scale within B. Modules of unequal rank are named in `rank_pattern`."""
    rank = factors.rank
    others = {module: a.shape[0] for module, (a, _) in factors.halves.items() if a.shape[0] != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": factors.base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {re.escape(module): r for module, r in others.items()},
        "alpha_pattern": {re.escape(module): r for module, r in others.items()},
        "lora_dropout": 0.0,
        # Whole names: the end of one would name it in every layer, also in those that have no tensors here. PEFT's
        # layers_to_transform finds no layer of an inner model.
        "target_modules": sorted(factors.halves),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.halves.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    with atomic_write(folder / "adapter_model.safetensors") as partial, umask_mode(partial):
        save_file(tensors, partial, metadata={"format": "pt"})
    if encoder_config:
        with atomic_write(folder / "llm2vec_config.json") as partial:
            partial.write_text(json.dumps(encoder_config, indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / "adapter_config.json") as partial:  # last: without it the folder is no adapter
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
