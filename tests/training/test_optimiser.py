"""Muon: torch's own where one process trains matrices alone, AdamW for the rest, orthogonal updates, exact resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import CPU, recipe_of, run_recipe
from unmask.training.distributed import Processes
from unmask.training.optimiser import Muon, make_optimiser, newton_schulz
from unmask.training.run_folder import RunFolder
from unmask.training.training_model import TrainingModel

MUON: dict[str, Any] = {"method": "muon", "lr": 2e-3}


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**31), power=st.integers(-36, 30))
def test_singular_values_are_near_one_whatever_the_size(rows: int, columns: int, seed: int, power: int) -> None:
    torch_dtype = (torch.float32, torch.bfloat16)[seed % 2]
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values.clamp_min(0.1 * float(values[0]))  # five iterations do not reach smaller ones
    result = newton_schulz(((u * values) @ v * 10.0**power).to(torch_dtype), 5).float()
    assert result.shape == matrix.shape
    measured_values = torch.linalg.svdvals(result)
    assert float(measured_values.min()) > 0.5
    assert float(measured_values.max()) < 1.35


def test_a_matrix_without_a_gradient_stays() -> None:
    assert not newton_schulz(torch.zeros(3, 5), 5).any()


def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw() -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((6, 4), (3, 8), (5,), (7, 4))]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    groups = [
        {"params": ours[:2], "muon": True, "weight_decay": 0.1},
        {"params": ours[2:], "muon": False, "weight_decay": 0.0},
    ]
    both = Muon(groups, 0.9, 5, torch.bfloat16, Processes(), lr=0.02)
    alone = [
        torch.optim.Muon(theirs[:2], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[2:], lr=0.02, weight_decay=0.0),
    ]
    for _ in range(5):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        both.step()
        for optimiser in alone:
            optimiser.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=0)  # of 0.02; products are in bfloat16


def test_matrices_of_layers_are_muons_and_nothing_else() -> None:
    model = TrainingModel(recipe_of(lora=None, head={"dimensions": 16}, optimiser=MUON), CPU)
    optimiser = make_optimiser(recipe_of(lora=None, head={"dimensions": 16, "lr": 1e-4}, optimiser=MUON), model)
    names = {id(parameter): name for name, parameter in model.parameters.items()}
    by_muon = {names[id(p)] for group in optimiser.param_groups if group["muon"] for p in group["params"]}
    assert by_muon == {name for name, p in model.parameters.items() if name.startswith("layers.") and p.ndim == 2}
    assert by_muon
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(model.parameters)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, data: Path) -> None:
    fields: dict[str, Any] = {"lora": None, "checkpoint_every": 3, "optimiser": {**MUON, "total_steps": 6}}
    run_recipe(recipe_of(steps=6, **fields), data, tmp_path / "whole")
    run_recipe(recipe_of(steps=3, **fields), data, tmp_path / "parts")
    run_recipe(recipe_of(steps=6, **fields), data, tmp_path / "parts", resume=True)
    whole, resumed = ([line["loss"] for line in RunFolder(tmp_path / each, 1).metrics()] for each in ("whole", "parts"))
    assert len(whole) == 6
    assert resumed == whole
    assert not list(tmp_path.glob("*.error"))


@pytest.mark.parametrize("fields", [{}, {"lora": None, "shard": True}])
def test_muon_needs_whole_matrices(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="goes with lora = false and without shard"):
        recipe_of(optimiser=MUON, **fields)
