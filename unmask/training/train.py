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
from unmask.training.decontamination import Held, read_held
from unmask.training.dev import DevSets
from unmask.training.distributed import Processes, processes
from unmask.training.examples import Examples, load_examples
from unmask.training.head import first_numbers, head_of, ridge
from unmask.training.loop import Progress, train_steps
from unmask.training.lora import adapter_tensors, write_adapter
from unmask.training.mixture import Mixture
from unmask.training.model_folder import write_head, write_model
from unmask.training.objectives import Teachers, objective_for
from unmask.training.recipe import Head, Recipe, stored_recipe
from unmask.training.run_folder import RunFolder, description_of
from unmask.training.sharding import whole
from unmask.training.targets import FILE, RankingTeacher, Targets
from unmask.training.trainee import (
    Trainee,
    adapter_base,
    choose_device,
    compute_dtype,
    embedding_base,
    starting_adapter,
)


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


def run_training(
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
        precision = recipe.precision
        if group.first:
            digests = {examples.source.name: examples.digest() for examples in sets}
            if recipe.lora is not None and recipe.lora.init_from is not None:
                digests["lora.init_from"] = starting_adapter(recipe).digest()
            chosen = str(compute_dtype(recipe.precision, device)).removeprefix("torch.")
            description = description_of(_plain(recipe), digests, _hardware(device, group), chosen)
            precision = folder.begin(description, resume, _upgraded).get("precision", chosen)
        recipe = msgspec.structs.replace(recipe, precision=group.of_first(precision))
        teachers = open_teachers(recipe, sets, folder, group) if recipe.distillation is not None else None
        trainee = Trainee(recipe, device, group)
        if recipe.head is not None:
            set_head(recipe, recipe.head, trainee, sets, teachers)
        objective = objective_for(recipe, trainee, teachers)
        mixture = Mixture(recipe, sets, data, held)
        if recipe.max_epochs is not None:
            recipe = msgspec.structs.replace(recipe, steps=min(recipe.steps, mixture.steps_of(recipe.max_epochs)))
        dev = DevSets(recipe, sets, data, teachers.targets if teachers is not None else None)

        base = adapter_base(recipe)

        def keep(name: str) -> Path:
            return _write_result(output / name, trainee, recipe, base)

        scores = train_steps(recipe, trainee, objective, mixture, dev, folder, lambda: keep("best"), tell)
        result = output / ("adapter" if recipe.lora is not None else "model")
        keep(result.name)
        if group.first:
            from unmask.training.curves import draw_curves

            draw_curves(folder)
        group.wait()
        return Outcome(output / "best" if scores else result, scores, group.first)


def load_data(recipe: Recipe, data: Path, say: Callable[[str], None]) -> tuple[list[Examples], Held | None]:
    """Every data set that is kept in memory, evaluation texts taken out, and the texts that were held apart."""
    held = None
    if recipe.decontaminate_against is not None:
        folder = data / recipe.decontaminate_against
        if not folder.is_dir():
            raise UsageError(f"decontaminate_against: no folder at {folder}")
        say(f"reading the texts of {recipe.decontaminate_against}, which must not be trained on")
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


def open_teachers(
    recipe: Recipe,
    sets: Sequence[Examples],
    folder: RunFolder,
    group: Processes,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> Teachers:
    """The teachers, with the vectors of every text in memory computed before the first step.

    Only the first process computes; the others find its vectors on the disk. A run that is killed meanwhile goes on
    where it was. Vectors of streamed texts are computed as they come.
    """
    settings = recipe.distillation
    assert settings is not None
    texts = distilled_texts(recipe, sets)
    sample = [texts[i] for i in np.random.default_rng([recipe.seed, 2]).permutation(len(texts))[: settings.sample]]

    def build() -> Teachers:
        targets = Targets(settings, sample, folder.path / FILE, texts, report)
        ranking = RankingTeacher(settings.ranking) if settings.ranking is not None else None
        if ranking is not None:
            pairs = [e for examples in sets if examples.source.query for e in examples.train]
            ranking.queries([e.query for e in pairs])
            ranking.documents([text for e in pairs for text in e.texts()[1:]])
        return Teachers(targets.of, ranking)

    teachers = build() if group.first else None
    group.wait()
    return teachers or build()


def distilled_texts(recipe: Recipe, sets: Sequence[Examples]) -> list[str]:
    """Every text that a teacher will be asked about, each once, in the data's order."""
    hard = recipe.contrastive.hard_negatives
    return list(
        dict.fromkeys(
            text
            for examples in sets
            if examples.source.use_teacher
            for example in (*examples.train, *examples.held_out)
            for text in (example.query, *filter(None, [example.positive]), *example.negatives[:hard])
        )
    )


def set_head(
    recipe: Recipe, settings: Head, trainee: Trainee, sets: Sequence[Examples], teachers: Teachers | None
) -> None:
    """Give the model under training the head that the recipe asks for; see `recipe.Head` for where it begins."""
    hidden_size = trainee.decoder.shape.hidden_size
    own = trainee.head
    if own is not None and own.out_features == settings.dimensions and not settings.refit:
        trainee.set_head(own, settings.trained)
        return
    if teachers is None or not settings.ridge:
        if settings.dimensions > hidden_size:
            raise UsageError(
                f"head.dimensions = {settings.dimensions} is more than the decoder's {hidden_size} and there is no "
                "teacher to fit it to; lower it, or add a distillation with head.ridge above 0"
            )
        trainee.set_head(first_numbers(hidden_size, settings.dimensions, trainee.device), settings.trained)
        return
    texts = distilled_texts(recipe, sets)
    order = np.random.default_rng([recipe.seed, 3]).permutation(len(texts))[: settings.ridge]
    chosen = [texts[i] for i in order]
    targets = teachers.targets(chosen)
    if targets.shape[1] != settings.dimensions:
        raise UsageError(
            f"head.dimensions = {settings.dimensions}, but targets have {targets.shape[1]} numbers; set "
            "distillation.dimensions to the same"
        )
    trainee.decoder.eval()
    weight, bias = trainee.processes.of_first(ridge(trainee.encode_pooled(chosen), targets, settings.penalty))
    trainee.set_head(head_of(weight, bias, trainee.device), settings.trained)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """As JSON gives it back."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def _upgraded(stored: dict[str, Any]) -> dict[str, Any]:
    """Bring the description of an older run to today's fields: new ones at their defaults, renamed ones renamed."""
    data = {"lora.init_from" if name == "lora.start" else name: digest for name, digest in stored["data"].items()}
    return {**stored, "recipe": _plain(stored_recipe(stored["recipe"])), "data": data}


def _write_result(folder: Path, trainee: Trainee, recipe: Recipe, base: str) -> Path:
    """Replace `folder` by the weights as they are. All processes must call it; the first one writes."""
    with trainee.averaged():
        weights = adapter_tensors(trainee.adapted) if recipe.lora is not None else whole(trainee.trained_decoder())
        head = None if trainee.head is None else {n: p.detach().clone() for n, p in trainee.head.named_parameters()}
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
        if head is not None:
            write_head(partial, head)
    else:
        write_model(partial, trainee.encoder, weights, head, recipe.save, embedding_base(recipe))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _hardware(device: torch.device, group: Processes) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{group.size} x {name}"
