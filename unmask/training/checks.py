"""Refuse a run whose recipe contradicts its model or its data, before anything is loaded, trained or written.

Contradictions within a recipe are refused where it is read (`recipe.py`). Those in this module show only beside the
model's headers and the rows. `unmask train --dry-run` and the run itself call the same function.
"""

from collections.abc import Sequence
from pathlib import Path

from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.checkpoint import Checkpoint
from unmask.encoder.head import head_steps, is_linear, vector_length
from unmask.encoder.loading import LoadOptions, open_prompts
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.encoder.prompts import DefaultPrompts
from unmask.encoder.shear import shear
from unmask.errors import AdapterMismatch, InputError, UnsupportedArchitecture, UsageError
from unmask.training.dev import DevSets
from unmask.training.distillation_settings import Distillation
from unmask.training.examples import Example, Examples, read_examples
from unmask.training.mixture import examples_per_draw
from unmask.training.mntp import mask_token_id
from unmask.training.recipe import Batch, DataSource, Recipe
from unmask.training.rows import BadRows
from unmask.training.training_model import initial_adapter


def check_run(recipe: Recipe, data: Path, sets: Sequence[Examples], base_dimensions: int | None = None) -> int:
    """Refuse a run that cannot do what its recipe says. Reads headers, a tokenizer and the dev sets, but no weights.

    Args:
        data: folder that the recipe's paths are taken from.
        sets: the data sets that are not streamed, as `load_data` gives them.
        base_dimensions: length of the base's vectors if a stage before this one writes it; default: read from it.

    Returns:
        The length of the vectors that the run trains.

    Raises:
        UsageError, CheckpointError: the message names the field.
    """
    checkpoint = open_checkpoint(recipe.base, recipe.adapters)
    shape = shape_of(checkpoint.config)
    if shape is None:
        kind = checkpoint.config.get("model_type")
        raise UnsupportedArchitecture(
            f"{recipe.base} is a {kind}, which has no row in unmask.encoder.model.architectures; it cannot be trained"
        )
    layers = shape.layers
    if recipe.layers is not None:
        layers = int(shear(checkpoint, recipe.layers).config["num_hidden_layers"])
    deepest = max((each.layers for each in recipe.exits), default=0)
    if deepest >= layers:
        raise UsageError(f"exits: {deepest} layers, but the model has {layers}; an exit needs fewer than the model")
    dimensions = _check_dimensions(recipe, checkpoint, shape, base_dimensions)
    if recipe.lora is not None and recipe.lora.init_from is not None:
        _check_initial_adapter(recipe, recipe.lora.init_from, recipe.lora.rank)
    if recipe.objective == "mntp":
        mask_token_id(checkpoint, recipe.mntp)
        if recipe.mntp.block < 2:
            raise UsageError(f"mntp.block = {recipe.mntp.block}: the first token of a block is never predicted; give 2")
    _check_prompts(recipe)
    in_memory = {examples.source.name: examples for examples in sets}
    for source in recipe.data:
        examples = in_memory.get(source.name)
        if examples is None:
            _check_stream(source, data, recipe.max_bad_rows)
        _check_teaches(source, None if examples is None else examples.train, recipe)
    DevSets(recipe.dev, sets, data, seed=recipe.seed, max_bad_rows=recipe.max_bad_rows)
    return dimensions


def _check_dimensions(recipe: Recipe, checkpoint: Checkpoint, shape: Shape, base_dimensions: int | None) -> int:
    """Return the length of the run's vectors; refuse lengths in the recipe that are longer."""
    tensors, stored_settings = checkpoint.tensors, checkpoint.encoder_config
    dimensions = base_dimensions or vector_length(tensors, shape.hidden_size, stored_settings)
    if recipe.head is not None:
        steps = head_steps(tensors, stored_settings)
        if not is_linear(steps) and any(step["kind"] == "dense" for step in steps):
            raise UsageError(
                f"[head]: {recipe.base} has {len(steps)} steps behind its pooling, dense layers among them, which stay "
                "as they are; leave [head] out"
            )
        dimensions = recipe.head.dimensions
        if dimensions > shape.hidden_size and (recipe.distillation is None or not recipe.head.ridge):
            raise UsageError(
                f"head.dimensions = {dimensions} is more than the decoder's {shape.hidden_size} and there is no "
                "teacher to fit it to; lower it, or add a distillation with head.ridge above 0"
            )
    owner = "the recipe's head gives" if recipe.head is not None else f"{recipe.base} gives"
    for name, lengths in (("matryoshka", recipe.matryoshka), ("save.matryoshka", recipe.save.matryoshka)):
        longer = [length for length in lengths if length > dimensions]
        if longer:
            raise UsageError(f"{name}: {longer[0]} is longer than the {dimensions} numbers of a vector that {owner}")
    positions = checkpoint.config.get("max_position_embeddings")
    if recipe.save.max_length is not None and positions is not None and recipe.save.max_length > positions:
        raise UsageError(
            f"save.max_length = {recipe.save.max_length}: {recipe.base} has {positions} positions; lower it"
        )
    settings = recipe.distillation
    if settings is not None and settings.vector_weight and (settings.dimensions or dimensions) < dimensions:
        raise UsageError(
            f"distillation.dimensions = {settings.dimensions}, but vectors have {dimensions} numbers: the vector loss "
            "needs a target at least as long; raise it, or add a [head] of that many dimensions"
        )
    return dimensions


def _check_initial_adapter(recipe: Recipe, name: str, rank: int) -> None:
    adapter = initial_adapter(name, recipe.base, recipe.adapters)
    modules = sorted(adapter.modules)
    assert recipe.lora is not None
    targets = {module.rpartition(".")[2] for module in modules}
    if targets != set(recipe.lora.targets):
        raise AdapterMismatch(
            f"lora.init_from: {name} adapts {', '.join(sorted(targets))}, and lora.targets are "
            f"{', '.join(sorted(recipe.lora.targets))}; make lora.targets those of the adapter"
        )
    own = len(adapter.halves(modules[0])[0])
    if own != rank:
        raise AdapterMismatch(f"lora.init_from: {name} has rank {own}, but lora.rank = {rank}; they must be equal")


def _check_prompts(recipe: Recipe) -> None:
    """Refuse a pooling that the tokenizer has no token for, and lengths that an instruction uses up."""
    options = LoadOptions(adapters=recipe.adapters, pooling=recipe.pooling, max_length=recipe.max_length)
    prompts = open_prompts(recipe.base, options)
    assert isinstance(prompts, DefaultPrompts)
    if recipe.objective == "mntp":
        return  # blocks of plain text
    for source in recipe.data:
        length = source.max_length or recipe.max_length
        try:
            prompts.at_most(length).build(["a"], source.instruction)
        except InputError as error:
            raise UsageError(f"data {source.name!r}: max_length = {length} is too short: {error}") from error


def _check_stream(source: DataSource, data: Path, max_bad_rows: float) -> None:
    """Read the first usable row of a streamed data set, so that a wrong path or column does not wait for its turn."""
    bad = BadRows(max_bad_rows)
    if next(read_examples(source, data, bad), None) is None:
        bad.close()
        raise UsageError(f"data {source.name!r}: no usable row in {source.path} ({bad.seen} seen)")


def _check_teaches(source: DataSource, examples: Sequence[Example] | None, recipe: Recipe) -> None:
    """Refuse a data set whose loss is 0 in every batch, so that steps on it learn nothing.

    Args:
        examples: all of them; None if the set is streamed, and only the columns are known.
    """
    if recipe.objective == "mntp":
        return
    count = examples_per_draw(recipe.batch, source)
    if len(recipe.data) == 1:
        count *= recipe.batch.sets  # all draws of a batch are of this set
    if recipe.objective == "simcse":
        texts = None if examples is None else {example.query for example in examples}
        problem = _no_other_text(source, count if recipe.batch.sets == 1 else 2, texts, recipe.batch)
    else:
        settings = recipe.distillation
        has_labels = source.use_labels and recipe.contrastive.weight and (source.label or source.query)
        problem = _no_negatives(source, count, examples, recipe) if has_labels else None
        if settings is not None and source.use_teacher and (problem is not None or not has_labels):
            problem = _no_similarities(source, count, settings, recipe)
    if problem is not None:
        raise UsageError(f"data {source.name!r}: {problem}; its loss would be 0 in every step")


def _size_of(source: DataSource, batch: Batch) -> str:
    """Name the fields that decide how many examples of a set are in a batch, with their values."""
    size = f"batch = {source.batch}" if source.batch is not None else f"batch.size = {batch.size}"
    return size if batch.sets == 1 else f"{size} and batch.sets = {batch.sets}"


def _no_other_text(source: DataSource, count: int, texts: set[str] | None, batch: Batch) -> str | None:
    if count < 2:
        return f"{_size_of(source, batch)} gives one text a step, and SimCSE tells it from the others of its batch"
    if texts is not None and len(texts) < 2:
        return "all its texts are the same, and SimCSE tells a text from the others of its batch"
    return None


def _no_negatives(source: DataSource, count: int, examples: Sequence[Example] | None, recipe: Recipe) -> str | None:
    """Say why no query of a set ever has a negative; None if one has."""
    hard = recipe.contrastive.hard_negatives if source.negatives else 0
    if hard and (examples is None or any(_hard_negatives(example, hard) for example in examples)):
        return None
    if count < 2:
        missing = "no hard negatives" if not hard else "no hard negative that differs from its pair"
        return (
            f"{_size_of(source, recipe.batch)} gives one pair a step and there are {missing}, so there is nothing to "
            "tell a positive from; raise the batch, or name negatives"
        )
    if examples is None:
        return None
    if source.label is not None:
        labels = {example.label for example in examples}
        return None if len(labels) > 1 else f"all its texts have the label {labels.pop()!r}, so none is a negative"
    return None if _has_in_batch_negatives(examples) else "no pair has a positive that could be another's negative"


def _hard_negatives(example: Example, count: int) -> list[str]:
    return [text for text in example.negatives[:count] if text not in (example.query, example.positive)]


def _has_in_batch_negatives(examples: Sequence[Example]) -> bool:
    """Tell whether some pair's positive differs from another pair's texts, as `losses.same_text` compares them."""
    positives = {example.positive for example in examples}
    # A pair rules out two texts, its own.
    return len(positives) > 2 or any(positives - {example.query, example.positive} for example in examples)


def _no_similarities(source: DataSource, count: int, settings: Distillation, recipe: Recipe) -> str | None:
    """Say why a batch of a set holds too few texts for every term of the distillation; None if it holds enough."""
    each = 1 if source.label is None and source.query is None else 2
    hard = recipe.contrastive.hard_negatives if source.negatives else 0
    if settings.ranking is not None and source.query is not None and (count > 1 or hard):
        return None
    texts = count * (each + hard) * (recipe.batch.sets if len(recipe.data) > 1 else 1)
    # A softmax over the one other text of a pair is 1, whatever the cosine.
    needed = 1 if settings.vector_weight else 2 if settings.similarity_weight else 3 if settings.weight else 0
    if needed and texts >= needed:
        return None
    return (
        f"{_size_of(source, recipe.batch)} gives {texts} texts a step, and the distillation compares "
        f"{needed or 'a query with several'} texts or more; raise the batch, or distillation.vector_weight"
    )
