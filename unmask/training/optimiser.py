"""The optimiser of a run, AdamW or Muon, and the learning rate over its steps.

Muon (K. Jordan and others, 2024) replaces the momentum of a matrix by the nearest orthogonal one: every direction in
which gradients agree moves equally far. Newton-Schulz iterations compute it, which are products of matrices alone. The
update is scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate serves both.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.training.distributed import Processes
from unmask.training.recipe import Optimiser, Recipe
from unmask.training.sharding import group_by_kind, unshard
from unmask.training.training_model import TrainingModel

# Coefficients of an iteration X -> aX + (bA + cAA)X with A = XX^T, which brings all singular values near 1 (K. Jordan).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Size of a number of AdamW's update, as a usual root mean square (arXiv 2502.16982).
_ADAMW_SIZE = 0.2


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon` true are updated by Muon instead.

    With several processes, each makes its share of the matrices orthogonal and gets the others'. All must call `step`
    with the same gradients.

    Args:
        groups: parameters with the options of AdamW, and `muon`: whether they are matrices for Muon.
        momentum: share of the earlier gradients in the momentum of a matrix; Nesterov's.
        iterations: of Newton-Schulz.
        dtype: precision of these, bfloat16 where the device multiplies in it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        iterations: int,
        dtype: torch.dtype,
        processes: Processes,
        **adamw: Any,
    ) -> None:
        super().__init__(groups, **adamw)
        self._momentum, self._iterations, self._dtype, self._processes = momentum, iterations, dtype, processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW looks for its own numbers in the state of every parameter.
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if not group["muon"]]})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        matrices = [(group, p) for group in groups if group["muon"] for p in group["params"] if p.grad is not None]
        updates = self._orthogonal([self._direction(p).to(self._dtype) for _, p in matrices])
        for (group, p), update in zip(matrices, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.to(p.dtype), alpha=-group["lr"] * _ADAMW_SIZE * max(p.shape) ** 0.5)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Update a matrix's momentum with its gradient, and return the momentum one step ahead (Nesterov)."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(momentum, self._momentum)

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return the nearest orthogonal matrix of each: all singular values near 1, with the same singular vectors."""
        shares = self._processes.shares([matrix.numel() * min(matrix.shape) for matrix in matrices])
        results = {i: newton_schulz(matrices[i], self._iterations) for i in shares[self._processes.rank]}
        for rank, share in enumerate(shares):
            if len(shares) == 1 or not share:
                continue
            sizes = [matrices[i].numel() for i in share]
            block = matrices[0].new_empty(sum(sizes))
            if rank == self._processes.rank:
                block = torch.cat([results[i].flatten() for i in share])
            self._processes.send(block, rank)
            results |= {i: part.view_as(matrices[i]) for i, part in zip(share, block.split(sizes), strict=True)}
        return [results[i] for i in range(len(matrices))]


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """Return about the nearest orthogonal matrix, [m, n], in the precision of a matrix [m, n] of any size but zero."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if (tall := matrix.shape[0] > matrix.shape[1]) else matrix
    # In units of the largest number: the squares of small ones would be 0.
    tiny = torch.finfo(x.dtype).tiny
    largest = x.abs().amax().clamp_min(tiny)
    x = x / ((x / largest).norm().float() * largest.float()).clamp_min(tiny)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def make_optimiser(recipe: Recipe, model: TrainingModel) -> torch.optim.AdamW:
    """Return the optimiser of a recipe over a model's parameters."""
    settings = recipe.optimiser
    head_lr = settings.lr if recipe.head is None else recipe.head.lr or settings.lr
    kinds: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.parameters.items():
        is_matrix, is_head = parameter.ndim > 1, name.startswith("head.")
        muon = settings.method == "muon" and is_matrix and name.startswith("layers.")
        kinds.setdefault((is_head, muon, is_matrix), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,  # not of norms and biases, as usual
            "lr_share": head_lr / settings.lr if is_head else 1.0,
            "muon": muon,
        }
        for (is_head, muon, is_matrix), parameters in sorted(kinds.items(), key=lambda kind: _order(*kind[0]))
    ]
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "fused": not model.sharded,  # one kernel for all of it; torch has none for split parameters
    }
    if settings.method == "adamw":
        return torch.optim.AdamW(groups, **options)
    return Muon(groups, settings.momentum, settings.iterations, model.dtype, model.processes, **options)


def _order(is_head: bool, muon: bool, is_matrix: bool) -> tuple[bool, bool, bool]:
    """Place of a kind of parameters among the groups. Checkpoints number parameters in this order."""
    return is_head, not is_matrix, muon


def learning_rate(step: int, optimiser: Optimiser, steps: int) -> float:
    """Return the learning rate of step number `step`, counted from 0.

    It rises linearly to `lr` during the warm-up, then follows the schedule. Zero is reached only after the last step.
    """
    total = optimiser.total_steps or steps
    if step < optimiser.warmup:
        return optimiser.lr * (step + 1) / optimiser.warmup
    along = min(1.0, (step - optimiser.warmup) / max(1, total - optimiser.warmup))
    if optimiser.schedule == "constant":
        share = 1.0
    elif optimiser.schedule == "linear":
        share = 1.0 - along
    elif optimiser.schedule == "cosine":
        share = (1 + math.cos(math.pi * along)) / 2
    else:
        share = min(1.0, (1.0 - along) / optimiser.decay_share) if optimiser.decay_share else 1.0
    return optimiser.lr * (optimiser.final_share + (1 - optimiser.final_share) * share)


def clip_gradients(parameters: Mapping[str, torch.nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit`, if it is not 0. Returns the norm before."""
    kinds = [[parameters[name] for name in names] for names in group_by_kind(parameters)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in kinds]
    # A decoder can be sharded while its head is whole in every process.
    total = norms[0] if len(norms) == 1 else torch.stack([unshard(norm).cpu() for norm in norms]).norm()
    for own in kinds:
        torch.nn.utils.clip_grads_with_norm_(own, limit or math.inf, total)
    return float(unshard(total))
