"""`unmask train`: a recipe in, a trained adapter or model out. The pieces are elsewhere; this is their order.

On several processes the same command is started by a launcher, and the recipe stays as it is:

    torchrun --nproc-per-node 8 -m unmask train recipe.toml --output RUN
    accelerate launch --num_processes 8 -m unmask train recipe.toml --output RUN

`batch.size` counts the examples of all processes together, so that the result does not depend on their number.
Across machines, every process must see the output folder if the run is to be resumed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from unmask.disk import atomic_write
from unmask.errors import UsageError
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.models import open_model
from unmask.home import home
from unmask.recipe.decontamination import Held, read_held
from unmask.recipe.dev import DevSets
from unmask.recipe.distributed import Processes, processes
from unmask.recipe.examples import Examples, load_examples
from unmask.recipe.loop import Progress, train_steps
from unmask.recipe.lora import adapter_tensors, write_adapter
from unmask.recipe.mixture import Mixture
from unmask.recipe.objectives import Teacher, objective_for
from unmask.recipe.recipe import Recipe
from unmask.recipe.run_folder import RunFolder, description_of
from unmask.recipe.sharding import whole
from unmask.recipe.trainee import Trainee, adapter_base, choose_device, starting_adapter


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Attributes:
        result: folder of the adapter or model.
        scores: of the best evaluation, 0-100; empty if the recipe names no dev set.
        first: whether this process speaks for the run. Only the first one evaluates.
    """

    result: Path
    scores: dict[str, float]
    first: bool


def train(
    recipe: Recipe,
    *,
    data: Path,
    output: Path,
    resume: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run a recipe to its end.

    Args:
        data: folder that the recipe's paths are taken from.
        output: the run's folder; see `run_folder`.
        resume: continue the run that is there.
        progress: told after every step.
        say: told what is worth a line.

    Raises:
        UsageError: the recipe and the data do not fit, or `output` holds another run.
        TrainingError, StorageError: see `loop.train_steps`.
    """
    device = choose_device(recipe.device)
    with processes(device) as group:
        tell = progress if group.first else lambda _: None
        sets, held = load_data(recipe, data, say if group.first else lambda _: None)
        folder = RunFolder(output, recipe.keep)
        if group.first:
            digests = {examples.source.name: examples.digest() for examples in sets}
            if recipe.lora is not None and recipe.lora.start is not None:
                digests["lora.start"] = starting_adapter(recipe).digest()
            folder.begin(description_of(_plain(recipe), digests, _hardware(device, group)), resume, _completed)
        group.wait()
        trainee = Trainee(recipe, device, group)
        teacher = open_teacher(recipe) if recipe.distillation is not None else None
        objective = objective_for(recipe, trainee, teacher)
        mixture = Mixture(recipe, sets, data, held)
        if recipe.epochs_at_most is not None:
            recipe = msgspec.structs.replace(recipe, steps=min(recipe.steps, mixture.steps_of(recipe.epochs_at_most)))
        dev = DevSets(recipe, sets, data)

        base = adapter_base(recipe)

        def keep(name: str) -> Path:
            return _write_result(output / name, trainee, recipe, base)

        scores = train_steps(recipe, trainee, objective, mixture, dev, folder, lambda: keep("best"), tell)
        result = output / ("adapter" if recipe.lora is not None else "model")
        keep(result.name)
        if group.first:
            from unmask.recipe.curves import draw_curves

            draw_curves(folder)
        group.wait()
        return Outcome(output / "best" if scores else result, scores, group.first)


def load_data(recipe: Recipe, data: Path, say: Callable[[str], None]) -> tuple[list[Examples], Held | None]:
    """Every data set that is kept in memory, evaluation texts taken out, and the texts that were held apart."""
    held = None
    if recipe.held_apart is not None:
        folder = data / recipe.held_apart
        if not folder.is_dir():
            raise UsageError(f"held_apart: no folder at {folder}")
        say(f"reading the texts of {recipe.held_apart}, which must not be trained on")
        held = read_held(folder)
    sets = []
    for source in recipe.data:
        if source.stream:
            continue
        examples = load_examples(source, data, held, recipe.seed, recipe.max_bad_rows)
        dropped = f", {examples.touching} held apart" if examples.touching else ""
        dropped += f", {examples.bad.bad} unusable ({examples.bad.places[0]})" if examples.bad.bad else ""
        say(f"{source.name}: {len(examples.train)} examples{dropped}")
        sets.append(examples)
    return sets, held


def open_teacher(recipe: Recipe) -> Teacher:
    """The teacher's vectors of any texts, computed once and kept by `unmask evaluate`'s cache."""
    assert recipe.distillation is not None
    contender = open_model(recipe.distillation.teacher)
    cache = VectorCache(home() / "vectors", contender.revision, contender.dimensions)

    def teach(texts: Sequence[str]) -> np.ndarray:
        return cache.encode(texts, "", lambda missing: contender.encode(missing))

    return teach


def _plain(recipe: Recipe) -> dict[str, Any]:
    """As JSON gives it back."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the fields that have come since it was written, at their defaults."""
    return _plain(msgspec.convert(stored, Recipe))


def _write_result(folder: Path, trainee: Trainee, recipe: Recipe, base: str) -> Path:
    """Replace `folder` by the weights as they are. All processes must call it; the first one writes."""
    weights = adapter_tensors(trainee.adapted) if recipe.lora is not None else whole(trainee.parameters)
    if not trainee.processes.first:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if recipe.lora is not None:
        write_adapter(partial, weights, recipe.lora, base, torch.float32)
        # The vectors are those of this pooling. The length is not written: one may train short and encode long.
        said = {**trainee.encoder.checkpoint.encoder_config, "pooling_mode": recipe.pooling}
        with atomic_write(partial / "llm2vec_config.json") as file:
            file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    else:
        from unmask.recipe.merging import write_model

        write_model(partial, trainee.encoder, weights)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _hardware(device: torch.device, group: Processes) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{group.size} x {name}"
