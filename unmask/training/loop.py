"""Run the training loop of every objective. All state that must survive a `kill -9` is in its checkpoints."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unmask.errors import TrainingError
from unmask.training.dev import DevSets
from unmask.training.mixture import Mixture, TextBatch
from unmask.training.objectives import Objective, StepReport
from unmask.training.optimiser import clip_gradients, learning_rate, make_optimiser
from unmask.training.recipe import Recipe
from unmask.training.run_folder import RunFolder
from unmask.training.sharding import copy_unsharded, place_like, shard_like, unshard
from unmask.training.training_model import TrainingModel


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Progress after a step, for a progress bar."""

    step: int
    steps: int
    loss: float  # mean of the last steps
    tokens_per_second: float
    scores: Mapping[str, float]  # of the last evaluation


def train_steps(
    recipe: Recipe,
    model: TrainingModel,
    objective: Objective,
    mixture: Mixture,
    dev: DevSets,
    folder: RunFolder,
    write_best: Callable[[], object],
    progress: Callable[[TrainingProgress], None],
) -> dict[str, float]:
    """Run the recipe's steps, from the last checkpoint if there is one.

    Args:
        write_best: writes the adapter or model after the best evaluation so far.
        progress: called after every step.

    Returns:
        The scores of the best evaluation, empty if there was none.

    Raises:
        TrainingError: the loss is not a number, or memory ran out; the last checkpoint is as it was.
        StorageError: a checkpoint could not be written; earlier ones are as they were.
    """
    processes = model.processes
    optimiser = make_optimiser(recipe, model)
    start, best = _resume(folder, model, optimiser)
    if processes.is_main:
        folder.truncate_metrics(start)  # also after a run that was killed before its first checkpoint
    scores = dict(best)
    losses: deque[float] = deque(maxlen=20)
    batches = mixture.batches(skip=start)
    for step in range(start, recipe.steps):
        began = time.perf_counter()
        rate = learning_rate(step, recipe.optimiser, recipe.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["lr_share"]
        batch = next(batches)
        with _memory_errors(step, recipe.batch.forward_tokens, folder):
            _seed_dropout(recipe.seed, step, processes.rank)
            report, norm = _train_step(model, optimiser, recipe.optimiser.clip, objective, batch, step, folder)
        seconds = time.perf_counter() - began
        losses.append(report.loss)
        done = step + 1
        if processes.is_main:
            folder.log(
                {
                    "step": done,
                    "data": batch.name,
                    "loss": round(report.loss, 6),
                    "lr": rate,
                    "norm": round(norm, 5),
                    "tokens": report.tokens,
                    "seconds": round(seconds, 4),
                }
            )
        if len(dev) and (done % recipe.evaluate_every == 0 or done == recipe.steps):
            scores, exit_scores = processes.broadcast(dev_scores(model, dev))
            if processes.is_main:
                folder.log({"step": done, "scores": scores} | ({"exits": exit_scores} if exit_scores else {}))
            if _mean(scores) > _mean(best):
                best = dict(scores)
                write_best()
            processes.wait()
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            state = _state(model, optimiser, best)
            if processes.is_main:
                folder.save(done, state)
        progress(TrainingProgress(done, recipe.steps, sum(losses) / len(losses), report.tokens / seconds, scores))
    return best


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    # Dropout depends only on the step and the process, so that a resumed run has the dropout of an uninterrupted one.
    torch.manual_seed((seed * 1_000_003 + step) * 1_024 + rank)


def _train_step(
    model: TrainingModel,
    optimiser: torch.optim.AdamW,
    clip: float,
    objective: Objective,
    batch: TextBatch,
    step: int,
    folder: RunFolder,
) -> tuple[StepReport, float]:
    """Compute the gradients of one batch and update the parameters.

    Returns:
        The objective's report, and the norm of the gradients before clipping.

    Raises:
        TrainingError: the loss or the norm is not a number. The parameters are not updated.
    """
    model.decoder.train()
    report = objective(batch, step)
    # With sharding, the backward has already summed the decoder's gradients. The head is not sharded.
    model.processes.sum_gradients(
        parameter for name, parameter in model.parameters.items() if not model.sharded or name.startswith("head.")
    )
    norm = clip_gradients(model.parameters, clip)
    if not math.isfinite(report.loss) or not math.isfinite(norm):
        raise TrainingError(
            f"step {step + 1}: the loss is {report.loss} and the gradient's norm {norm}, in a batch of "
            f"{batch.name!r}. {_last_checkpoint(folder)} Lower optimiser.lr, or raise optimiser.warmup"
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    model.merge()
    model.update_average()
    return report, norm


def dev_scores(model: TrainingModel, dev: DevSets) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Score the weights that would be written now, without dropout. All processes must call it; all get the scores.

    Returns:
        The scores of the full depth, and those of each exit by its number of layers.
    """
    exit_vectors: list[list[np.ndarray]] = []  # of each call of `encode`, in its order

    def encode(texts: Sequence[str], instruction: str) -> np.ndarray:
        full, *early = model.encode_depths(texts, instruction)
        exit_vectors.append(early)
        return full

    model.decoder.eval()
    model.merge()
    with model.averaged():
        scores = _rounded(dev.scores(encode))
    model.decoder.train()
    model.merge()
    exit_scores: dict[int, dict[str, float]] = {}
    for number, layers in enumerate(model.exit_heads):
        # The same calls in the same order: one forward has computed the vectors of all depths.
        calls = iter(exit_vectors)
        exit_scores[layers] = _rounded(dev.scores(lambda *_, calls=calls, number=number: next(calls)[number]))
    return scores, exit_scores


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(score, 3) for name, score in scores.items()}


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores) if scores else -math.inf


def _state(model: TrainingModel, optimiser: torch.optim.AdamW, best: Mapping[str, float]) -> dict[str, Any]:
    state = {"parameters": model.parameters, "optimiser": optimiser.state_dict(), "best": dict(best)}
    return unshard(state | ({"average": model.average} if model.average else {}), model.processes.is_main)


def _resume(folder: RunFolder, model: TrainingModel, optimiser: torch.optim.AdamW) -> tuple[int, dict[str, float]]:
    """Continue at the last checkpoint. Returns its step, 0 if there is none, and its best scores.

    The main process reads it for all: another machine may not see the folder, and would begin at step 0.
    """
    latest = folder.latest() if model.processes.is_main else None
    step = model.processes.broadcast(0 if latest is None else latest[0])
    if step == 0:
        return 0, {}
    return step, _restore(None if latest is None else latest[1], model, optimiser)


def _restore(state: Mapping[str, Any] | None, model: TrainingModel, optimiser: torch.optim.AdamW) -> dict[str, float]:
    """Take over the main process's checkpoint, tensor by tensor. Returns the best scores in it."""
    # torch numbers the parameters of an optimiser across its groups. Moments are sharded like their parameters.
    ordered = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    def place(path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor | None:
        if path[0] == "parameters":
            copy_unsharded(model.parameters[path[1]], tensor)
            return None
        if path[0] == "average":
            return place_like(tensor, model.parameters[path[1]])
        return shard_like(tensor, ordered[path[2]])  # the optimiser moves its state to its parameters itself

    restored = model.processes.broadcast_state(state, place)
    model.average = restored.get("average", {})
    stored = restored["optimiser"]
    groups = [
        {"lr_share": own["lr_share"], "muon": own["muon"], **group}  # which older checkpoints lack
        for own, group in zip(optimiser.param_groups, stored["param_groups"], strict=True)
    ]
    optimiser.load_state_dict({"param_groups": groups, "state": stored["state"]})
    model.merge()
    return dict(restored["best"])


@contextmanager
def _memory_errors(step: int, forward_tokens: int, folder: RunFolder) -> Iterator[None]:
    """Turn a lack of memory into an error that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has an exception for an accelerator's memory. On a CPU it raises one of these two, with these words.
        message = str(error).lower()
        if isinstance(error, RuntimeError) and not any(word in message for word in ("memory", "bad_alloc")):
            raise
        raise TrainingError(
            f"step {step + 1}: out of memory. {_last_checkpoint(folder)} Lower batch.forward_tokens (now "
            f"{forward_tokens}); the batch and its gradient stay the same"
        ) from error


def _last_checkpoint(folder: RunFolder) -> str:
    latest = max((folder.path / "checkpoints").glob("step-*"), default=None)
    return f"The last good checkpoint is {latest.name}." if latest else "There is no checkpoint yet."
