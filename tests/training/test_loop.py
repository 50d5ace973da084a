"""Tests of the training loop: learning rate, failures, and the state after them."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import CPU, recipe_of
from unmask.errors import TrainingError
from unmask.training.dev import DevSets
from unmask.training.examples import load_examples
from unmask.training.loop import TrainingProgress, train_steps
from unmask.training.mixture import TextBatch
from unmask.training.objectives import Objective, StepReport, objective_for
from unmask.training.optimiser import learning_rate
from unmask.training.recipe import Optimiser, Recipe
from unmask.training.run_folder import RunFolder
from unmask.training.train import mixture_of
from unmask.training.training_model import TrainingModel

SCHEDULES = st.sampled_from(["linear", "cosine", "constant", "wsd"])


@given(SCHEDULES, st.integers(1, 200), st.integers(0, 100), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_rate_climbs_to_its_height_and_never_past_it(
    schedule: Any, steps: int, warmup: int, final_share: float, decay_share: float
) -> None:
    optimiser = Optimiser(lr=2.0, schedule=schedule, warmup=warmup, final_share=final_share, decay_share=decay_share)
    rates = [learning_rate(step, optimiser, steps) for step in range(steps)]
    assert all(0 < rate <= 2.0 * (1 + 1e-12) for rate in rates)
    climb, rest = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(climb))
    assert all(a >= b - 1e-12 for a, b in pairwise(rest))
    if rest:
        assert rest[0] == pytest.approx(2.0)
        assert rest[-1] >= 2.0 * final_share * (1 - 1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_rate_ends_near_zero(schedule: Any) -> None:
    optimiser = Optimiser(lr=1.0, schedule=schedule, warmup=10, decay_share=0.3)
    rates = [learning_rate(step, optimiser, 1000) for step in range(1000)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert 0 < rates[-1] < 0.005
    if schedule == "wsd":
        assert set(rates[10:700]) == {1.0}
        assert rates[-150] == pytest.approx(0.5, abs=0.02)
    if schedule == "linear":
        assert rates[505] == pytest.approx(0.5)
    if schedule == "cosine":
        assert rates[10 + 330] == pytest.approx(0.75, abs=0.01)


def test_llm2vecs_rate_is_that_of_three_epochs_stopped_early() -> None:
    optimiser = Optimiser(lr=2e-4, warmup=300, total_steps=9000)
    assert learning_rate(299, optimiser, 1000) == pytest.approx(2e-4)
    assert learning_rate(999, optimiser, 1000) == pytest.approx(2e-4 * (1 - 699 / 8700))


def running(
    folder: Path,
    data: Path,
    objective: Callable[[Objective], Objective] = lambda real: real,
    scores: Callable[[int], dict[str, float]] | None = None,
    best_steps: list[int] | None = None,
    progress: Callable[[TrainingProgress], None] = lambda _: None,
    **fields: Any,
) -> tuple[Recipe, dict[str, float], RunFolder]:
    """Train with a changed objective or invented scores."""
    recipe = recipe_of(**{"checkpoint_every": 2, "evaluate_every": 2, **fields})
    model = TrainingModel(recipe, CPU)
    sets = [load_examples(source, data, None, recipe.seed, 0.0) for source in recipe.data]
    mixture, dev = mixture_of(recipe, sets, data, None), DevSets(recipe.dev, [], data)
    run = RunFolder(folder, recipe.keep)
    real = objective(objective_for(recipe, model, None))
    steps: list[int] = []

    def watched(batch: TextBatch, step: int) -> StepReport:
        steps.append(step + 1)
        return real(batch, step)

    if scores is not None:
        dev.__class__ = type("Invented", (DevSets,), {"__len__": lambda _: 1, "scores": lambda *_: scores(steps[-1])})
    keep = lambda: best_steps.append(steps[-1]) if best_steps is not None else None  # noqa: E731
    best_scores = train_steps(recipe, model, watched, mixture, dev, run, keep, progress)
    return recipe, best_scores, run


def failing(at: int, failure: Callable[[], StepReport]) -> Callable[[Objective], Objective]:
    def changed(real: Objective) -> Objective:
        return lambda batch, step: failure() if step == at else real(batch, step)

    return changed


def raising(error: Exception) -> Callable[[], StepReport]:
    def fail() -> StepReport:
        raise error

    return fail


def intact(run: RunFolder, step: int) -> None:
    latest = run.latest()
    assert latest is not None
    assert latest[0] == step
    assert all(torch.isfinite(tensor).all() for tensor in latest[1]["parameters"].values())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_do(error: Exception, tmp_path: Path, data: Path) -> None:
    expected = r"step 5: out of memory. The last good checkpoint is step-00000004. Lower batch.forward_tokens \(now"
    with pytest.raises(TrainingError, match=expected):
        running(tmp_path, data, failing(4, raising(error)))
    intact(RunFolder(tmp_path, 2), 4)


def test_another_error_is_not_taken_for_it(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        running(tmp_path, data, failing(4, raising(RuntimeError("shapes do not fit"))))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(loss: float, tmp_path: Path, data: Path) -> None:
    expected = rf"step 5: the loss is {loss} and .* in a batch of 'pairs'. The last good checkpoint is step-00000004"
    with pytest.raises(TrainingError, match=expected):
        running(tmp_path, data, failing(4, lambda: StepReport(loss, 1)))
    intact(RunFolder(tmp_path, 2), 4)


def test_so_does_a_gradient_that_is_none(tmp_path: Path, data: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 1: .*norm (nan|inf).*There is no checkpoint yet"):
        running(tmp_path, data, optimiser={"lr": 1e30, "clip": 0}, contrastive={"temperature": 1e-44})


def test_the_best_is_kept_and_survives_a_resume(tmp_path: Path, data: Path) -> None:
    invented = {2: 50.0, 4: 70.0, 6: 60.0, 8: 69.0, 10: 71.0}
    best_steps: list[int] = []
    _, best, run = running(tmp_path, data, scores=lambda step: {"a": invented[step]}, best_steps=best_steps, steps=6)
    assert (best, best_steps) == ({"a": 70.0}, [2, 4])
    _, best, _ = running(tmp_path, data, scores=lambda step: {"a": invented[step]}, best_steps=best_steps, steps=8)
    assert (best, best_steps) == ({"a": 70.0}, [2, 4])
    _, best, _ = running(tmp_path, data, scores=lambda step: {"a": invented[step]}, best_steps=best_steps, steps=10)
    assert (best, best_steps) == ({"a": 71.0}, [2, 4, 10])
    assert [line["scores"]["a"] for line in run.metrics() if "scores" in line] == list(invented.values())


def test_every_step_is_logged_once_and_told(tmp_path: Path, data: Path) -> None:
    reports: list[TrainingProgress] = []
    _, _, run = running(tmp_path, data, progress=reports.append)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {"step", "data", "loss", "lr", "norm", "tokens", "seconds"}
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])
    assert [(now.step, now.steps) for now in reports] == [(i, 6) for i in range(1, 7)]
    assert reports[2].loss == pytest.approx(sum(line["loss"] for line in lines[:3]) / 3, abs=1e-5)


def test_steps_before_the_first_checkpoint_are_not_logged_twice(tmp_path: Path, data: Path) -> None:
    stop = failing(3, raising(RuntimeError("stop")))
    with pytest.raises(RuntimeError):
        running(tmp_path, data, stop, checkpoint_every=100)
    _, _, run = running(tmp_path, data, checkpoint_every=100)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_training_lowers_the_loss(tmp_path: Path, data: Path) -> None:
    _, _, run = running(tmp_path, data, steps=40, contrastive={"temperature": 0.05}, checkpoint_every=100)
    losses = [line["loss"] for line in run.metrics()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_decay_falls_on_matrices_alone(tmp_path: Path, data: Path) -> None:
    """Biases and norms keep their length where nothing but decay moves them."""
    recipe = recipe_of(lora=None, optimiser={"lr": 0.1, "weight_decay": 0.5})
    model = TrainingModel(recipe, CPU)
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    sets = [load_examples(source, data, None, recipe.seed, 0.0) for source in recipe.data]

    def nothing(batch: TextBatch, step: int) -> StepReport:
        for parameter in model.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        return StepReport(1.0, 1)

    one_step = recipe_of(lora=None, steps=1, optimiser={"lr": 0.1, "weight_decay": 0.5})
    train_steps(one_step, model, nothing, mixture_of(recipe, sets, data, None), DevSets(recipe.dev, [], data),
                RunFolder(tmp_path, 1), lambda: None, lambda _: None)  # fmt: skip
    for name, parameter in model.parameters.items():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
