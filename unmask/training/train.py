"""`unmask train`: from a recipe to a trained adapter or model. This module calls the others in order.

With several processes a launcher starts the same command, and the recipe stays the same:

    torchrun --nproc-per-node 8 -m unmask train recipe.toml --output RUN
    accelerate launch --num_processes 8 -m unmask train recipe.toml --output RUN

`batch.size` counts the examples of all processes together, so that the result does not depend on their number.
The main process alone reads and writes the run; other machines need not see its folder.
"""

import hashlib
import json
import operator
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from unmask.disk import atomic_write
from unmask.encoder.head import UNIT_LINEAR, Head
from unmask.errors import UsageError
from unmask.training.checks import check_run
from unmask.training.decontamination import Decontaminator, read_decontaminator
from unmask.training.dev import DevSets
from unmask.training.device import choose_device, compute_dtype
from unmask.training.distributed import Processes, processes, restarted
from unmask.training.examples import Examples, load_examples
from unmask.training.head import first_numbers, linear_head, ridge
from unmask.training.loop import TrainingProgress, train_steps
from unmask.training.lora import adapter_tensors, write_adapter
from unmask.training.mixture import Mixture, StreamOptions
from unmask.training.model_folder import adapter_settings, write_head, write_model
from unmask.training.objectives import Teachers, objective_for
from unmask.training.optimiser import learning_rate
from unmask.training.recipe import HeadSettings, Recipe
from unmask.training.run_folder import RunFolder, describe_run
from unmask.training.sharding import unshard
from unmask.training.targets import FILE, RankingTeacher, Targets, compute_vectors, targets_file
from unmask.training.training_model import TrainingModel, adapter_base, embedding_base, initial_adapter

LoadedData = tuple[list[Examples], Decontaminator | None]

# Any text tells the length of the targets.
_PROBE = "The length of this text's target is asked for."


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run.

    Attributes:
        folder: the adapter or model with the best scores, or the last one if the recipe names no dev set.
        scores: scores of the best evaluation, 0-100; empty if the recipe names no dev set.
        is_main: this process writes files and reports for the run.
    """

    folder: Path
    scores: dict[str, float]
    is_main: bool


def run_training(
    recipe: Recipe,
    *,
    data: Path,
    output: Path,
    resume: bool = False,
    loaded: LoadedData | None = None,
    progress: Callable[[TrainingProgress], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Train as a recipe says.

    Args:
        data: folder that the recipe's paths are taken from.
        output: the run's folder; see `run_folder`.
        resume: continue the run that is there. A process that torchrun has started again always does.
        loaded: the data, where `load_data` has read it already for another run of the same data section and seed.
        progress: called after every step.
        log: called with each line of the report.

    Raises:
        UsageError: the recipe and the data do not fit, or `output` holds another run.
        TrainingError, StorageError: see `loop.train_steps`.
    """
    device = choose_device(recipe.device)
    with processes(device) as group:
        report_progress = progress if group.is_main else lambda _: None
        sets, decontaminator = loaded or load_data(recipe, data, log if group.is_main else lambda _: None)
        check_run(recipe, data, sets)
        group.require_equal(
            {examples.source.name: examples.digest() for examples in sets},
            "the data set {name} differs between machines ({places}); copy the same files to all",
        )
        folder = RunFolder(output, recipe.keep)
        precision = recipe.precision
        if group.is_main:
            description = _description(recipe, sets, data, device, group)
            again = resume or restarted()
            stored = folder.begin(description, again, lambda before: _upgraded(before, recipe, folder.step()))
            precision = stored.get("precision", description["precision"])
        recipe = msgspec.structs.replace(recipe, precision=group.broadcast(precision))
        teachers = None
        if recipe.distillation is not None:
            teachers = open_teachers(
                recipe, sets, data, folder, group, _counted(log if group.is_main else lambda _: None)
            )
        model = TrainingModel(recipe, device, group)
        if recipe.head is not None:
            set_heads(recipe, recipe.head, model, sets, teachers)
        objective = objective_for(recipe, model, teachers)
        if teachers is not None:
            _check_target_length(recipe, model, teachers)
        mixture = mixture_of(recipe, sets, data, decontaminator)
        if recipe.max_epochs is not None:
            recipe = msgspec.structs.replace(recipe, steps=min(recipe.steps, mixture.steps_of(recipe.max_epochs)))
        dev = dev_sets_of(recipe, sets, data, teachers)

        base = adapter_base(recipe.base, recipe.adapters)

        def write_result(name: str) -> Path:
            return _write_result(output / name, model, recipe, base)

        scores = train_steps(
            recipe, model, objective, mixture, dev, folder, lambda: write_result("best"), report_progress
        )
        result = output / ("adapter" if recipe.lora is not None else "model")
        write_result(result.name)
        if group.is_main:
            from unmask.training.curves import draw_curves

            draw_curves(folder)
        group.wait()
        return TrainingResult(output / "best" if scores else result, scores, group.is_main)


def _description(
    recipe: Recipe, sets: Sequence[Examples], data: Path, device: torch.device, group: Processes
) -> dict[str, Any]:
    """Return the content of a new run's `run.json`."""
    digests = {examples.source.name: examples.digest() for examples in sets}
    if recipe.lora is not None and recipe.lora.init_from is not None:
        adapter = initial_adapter(recipe.lora.init_from, recipe.base, recipe.adapters)
        digests["lora.init_from"] = adapter.digest()
    earlier = None if recipe.distillation is None else targets_file(recipe.distillation, data)
    if earlier is not None:
        digests["distillation.targets"] = hashlib.sha256(earlier.read_bytes()).hexdigest()[:16]
    precision = str(compute_dtype(recipe.precision, device)).removeprefix("torch.")
    rows = {examples.source.name: examples.counts() for examples in sets}
    return describe_run(_plain(recipe), digests, _hardware(device, group), precision, rows)


def load_data(recipe: Recipe, data: Path, log: Callable[[str], None]) -> LoadedData:
    """Read every data set that is not streamed, without the rows that overlap with evaluation data.

    Returns:
        The data sets, and the decontaminator for the streamed ones if the recipe names evaluation data.
    """
    decontaminator = None
    if recipe.decontaminate_against is not None:
        folder = data / recipe.decontaminate_against
        if not folder.is_dir():
            raise UsageError(f"decontaminate_against: no folder at {folder}")
        log(f"reading the texts of {recipe.decontaminate_against}, for decontamination")
        decontaminator = read_decontaminator(folder)
    sets = []
    for source in recipe.data:
        if source.stream:
            continue
        examples = load_examples(source, data, decontaminator, recipe.seed, recipe.max_bad_rows)
        dropped = f", {examples.overlapping} dropped that overlap with evaluation data" if examples.overlapping else ""
        dropped += f", {examples.bad.bad} unusable ({examples.bad.places[0]})" if examples.bad.bad else ""
        log(f"{source.name}: {len(examples.train)} examples{dropped}")
        sets.append(examples)
    return sets, decontaminator


def mixture_of(
    recipe: Recipe, sets: Sequence[Examples], data: Path | None, decontaminator: Decontaminator | None
) -> Mixture:
    """Return the batches of a recipe's data."""
    stream = StreamOptions(
        root=data,
        decontaminator=decontaminator,
        max_bad_rows=recipe.max_bad_rows,
        shuffle_buffer=recipe.shuffle_buffer,
    )
    return Mixture(recipe.data, sets, recipe.batch, recipe.seed, stream)


def dev_sets_of(recipe: Recipe, sets: Sequence[Examples], data: Path | None, teachers: Teachers | None) -> DevSets:
    """Read the sets that a recipe evaluates. Held-out texts are scored if the model learns the teachers' vectors."""
    settings = recipe.distillation
    learns_vectors = teachers is not None and settings is not None and settings.vector_weight
    targets = teachers.targets if teachers is not None and learns_vectors else None
    return DevSets(recipe.dev, sets, data, targets, seed=recipe.seed, max_bad_rows=recipe.max_bad_rows)


def open_teachers(
    recipe: Recipe,
    sets: Sequence[Examples],
    data: Path,
    folder: RunFolder,
    group: Processes,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> Teachers:
    """Open the teachers and compute their vectors of every text in memory.

    Each process computes its share and reads the others' from disk. An interrupted run continues where it was. Vectors
    of streamed texts are computed when they are needed.
    """
    settings = recipe.distillation
    assert settings is not None
    texts = distilled_texts(sets, recipe.contrastive.hard_negatives)
    sample = [texts[i] for i in np.random.default_rng([recipe.seed, 2]).permutation(len(texts))[: settings.sample]]
    compute_vectors(settings, texts[group.rank :: group.size], report)
    group.wait()

    def build() -> Teachers:
        targets = Targets(settings, sample, folder.path / FILE, targets_file(settings, data))
        ranking = RankingTeacher(settings.ranking) if settings.ranking is not None else None
        if ranking is not None:
            pairs = [e for examples in sets if examples.source.query for e in examples.train]
            ranking.queries([e.query for e in pairs])
            ranking.documents([text for e in pairs for text in e.texts()[1:]])
        return Teachers(targets.encode, ranking)

    teachers = build() if group.is_main else None
    group.wait()
    return teachers or build()


def _check_target_length(recipe: Recipe, model: TrainingModel, teachers: Teachers) -> None:
    """Refuse vectors longer than their targets, whose length is known only when the teachers are open."""
    settings = recipe.distillation
    if settings is None or not settings.vector_weight:
        return
    length = teachers.targets([_PROBE]).shape[1]
    if model.dimensions > length:
        raise UsageError(
            f"distillation.vector_weight: vectors have {model.dimensions} numbers and targets {length}; add a [head] "
            f"with dimensions = {length}"
        )


def _counted(log: Callable[[str], None], every: float = 15.0) -> Callable[[str, int, int], None]:
    """Return a function that counts steps by name and logs the count every `every` seconds at most, and at the end."""
    counts: dict[str, int] = {}
    last = time.monotonic()

    def report(name: str, done: int, total: int) -> None:
        nonlocal last
        counts[name] = counts.get(name, 0) + done
        if time.monotonic() - last >= every or (counts[name] >= total and done < total):
            last = time.monotonic()
            log(f"{name}: {counts[name]:,} of {total:,} texts")

    return report


def distilled_texts(sets: Sequence[Examples], hard_negatives: int) -> list[str]:
    """Return every text whose teacher vector is needed, each once, in the order of the data.

    Args:
        hard_negatives: number of hard negatives per example that are used.
    """
    return list(
        dict.fromkeys(
            text
            for examples in sets
            if examples.source.use_teacher
            for example in (*examples.train, *examples.held_out)
            for text in (example.query, *filter(None, [example.positive]), *example.negatives[:hard_negatives])
        )
    )


def set_heads(
    recipe: Recipe, settings: HeadSettings, model: TrainingModel, sets: Sequence[Examples], teachers: Teachers | None
) -> None:
    """Put the heads that the recipe asks for on a model: its own and that of each exit.

    See `HeadSettings` for their initial weights.
    """
    own = model.head
    if isinstance(own, Head):
        own = None  # scaling or truncation alone: the new layer stands in its place
    keeps_own = own is not None and own.out_features == settings.dimensions and not settings.refit
    if teachers is None or not settings.ridge:
        initial_head = partial(_first_numbers, settings, model)
    elif keeps_own and not recipe.exits:
        initial_head = None
    else:
        texts = distilled_texts(sets, recipe.contrastive.hard_negatives)
        order = np.random.default_rng([recipe.seed, 3]).permutation(len(texts))[: settings.ridge]
        initial_head = _ridge_heads(settings, model, [texts[i] for i in order], teachers)
    if own is not None and keeps_own:
        model.set_head(own, settings.trained)
    elif initial_head is not None:
        model.set_head(initial_head(None), settings.trained)
    for each in recipe.exits:
        assert initial_head is not None
        model.set_exit_head(each.layers, initial_head(each.layers), settings.trained)


def _first_numbers(settings: HeadSettings, model: TrainingModel, _layers: int | None) -> nn.Linear:
    """Make a head that keeps the first numbers of the pooled state, of whatever layer."""
    hidden_size = model.decoder.shape.hidden_size
    if settings.dimensions > hidden_size:
        raise UsageError(
            f"head.dimensions = {settings.dimensions} is more than the decoder's {hidden_size} and there is no "
            "teacher to fit it to; lower it, or add a distillation with head.ridge above 0"
        )
    return first_numbers(hidden_size, settings.dimensions, model.device)


def _ridge_heads(
    settings: HeadSettings, model: TrainingModel, texts: Sequence[str], teachers: Teachers
) -> Callable[[int | None], nn.Linear]:
    """Return a function that fits the head of the decoder cut after a number of layers (None: all) to the teachers."""
    targets = teachers.targets(texts)
    if targets.shape[1] != settings.dimensions:
        raise UsageError(
            f"head.dimensions = {settings.dimensions}, but targets have {targets.shape[1]} numbers; set "
            "distillation.dimensions to the same"
        )
    model.decoder.eval()

    def fit(layers: int | None) -> nn.Linear:
        pooled = model.encode_pooled(texts, layers)
        return linear_head(*model.processes.broadcast(ridge(pooled, targets, settings.penalty)), model.device)

    return fit


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON would give it back."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def _upgraded(stored: dict[str, Any], recipe: Recipe, done: int) -> dict[str, Any]:
    """Bring the description of an older run to today's fields: new ones at their defaults.

    The number of steps may be another one, if the rates of all steps done are those of a run that began with it.
    """
    before = msgspec.convert(stored["recipe"], Recipe)
    # Older runs name the defaults of their time; a recipe that names neither now follows its base.
    if recipe.pooling is None and before.pooling == "mean":
        before = msgspec.structs.replace(before, pooling=None)
    if recipe.causal is None and before.causal is False:
        before = msgspec.structs.replace(before, causal=None)
    if before.head is not None and "normalize" not in (stored["recipe"].get("head") or {}):
        before = msgspec.structs.replace(before, head=msgspec.structs.replace(before.head, normalize=False))
    rates = ([learning_rate(step, each.optimiser, each.steps) for step in range(done)] for each in (before, recipe))
    if done <= recipe.steps and recipe.max_epochs is None and operator.eq(*rates):
        before = msgspec.structs.replace(before, steps=recipe.steps)
    return {**stored, "recipe": _plain(before)}


def _write_result(folder: Path, model: TrainingModel, recipe: Recipe, base: str) -> Path:
    """Replace `folder` by the current weights, and `folder`-N-layers by those of each exit.

    All processes must call it; the main one writes.
    """
    # Weights that are not sharded are written as they lie in the model: it has its average until they are on disk.
    with model.averaged():
        if recipe.lora is not None:
            weights = adapter_tensors(model.adapted)
        else:
            weights = unshard(model.trained_decoder(), model.processes.is_main)
        if model.processes.is_main:
            _write_weights(folder, model, recipe, base, weights)
    return folder


def _write_weights(
    folder: Path, model: TrainingModel, recipe: Recipe, base: str, weights: Mapping[str, torch.Tensor]
) -> None:
    # A base's own steps with activations are never trained: they stay in its folder.
    head = dict(model.head.named_parameters()) if isinstance(model.head, nn.Linear) else None
    exit_heads = {layers: dict(each.named_parameters()) for layers, each in model.exit_heads.items()}
    own_steps = model.encoder.checkpoint.encoder_config.get("head") or ()
    steps = own_steps if recipe.head is None else UNIT_LINEAR if recipe.head.normalize else ()
    if recipe.lora is not None:
        with _replaced(folder) as new:
            write_adapter(new, weights, recipe.lora, base, torch.float32)
            encoder_config = adapter_settings(recipe, model.encoder.checkpoint.encoder_config)
            if head is not None:
                encoder_config["head"] = [dict(step) for step in steps]
            with atomic_write(new / "llm2vec_config.json") as file:
                file.write_text(json.dumps(encoder_config, indent=2) + "\n", encoding="utf-8")
            if head is not None:
                write_head(new, head)
        return
    for layers, own_head in {None: head, **exit_heads}.items():
        with _replaced(folder if layers is None else folder.with_name(f"{folder.name}-{layers}-layers")) as new:
            write_model(new, model.encoder, weights, own_head, steps, recipe.save, embedding_base(recipe.base), layers)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Give a path to write a folder at, which then takes the place of `folder`."""
    new = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    yield new
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _hardware(device: torch.device, group: Processes) -> str:
    if device.type == "cuda":
        return f"{group.size} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{group.size} x CPU, {threads} thread{'s' if threads > 1 else ''}"
