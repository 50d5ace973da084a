"""What a run would take, without running it: examples, tokens, memory, time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from unmask.checkpoint import open_checkpoint
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.errors import UnsupportedArchitecture
from unmask.training.examples import Example, Examples
from unmask.training.recipe import DataSource, Recipe
from unmask.training.train import load_data
from unmask.training.training_model import choose_device, compute_dtype

_SAMPLE = 200
# Of the matrix products' own speed, what a whole step reaches: measured on CPUs with the shipped recipe.
_EFFICIENCY = 0.6


@dataclass(frozen=True)
class SourcePlan:
    """One data set: examples (None if streamed), mean tokens of an example, share of the steps."""

    name: str
    examples: int | None
    held_out: int
    tokens_per_example: float
    examples_per_step: int
    share: float


@dataclass(frozen=True)
class RunPlan:
    """Estimates for a whole run.

    Attributes:
        sources: per data set.
        tokens: that go forward over all steps.
        memory_bytes: weights, optimiser and the activations of one forward.
        seconds: from the speed of this machine's matrix products, measured now.
        trained: parameters that the optimiser changes.
    """

    sources: list[SourcePlan]
    steps: int
    tokens: int
    memory_bytes: int
    seconds: float
    trained: int


def plan_run(recipe: Recipe, data: Path, log: Callable[[str], None]) -> RunPlan:
    """Read the data, count a sample's tokens, and estimate. Nothing is written and no weight is read.

    Raises:
        UsageError, CheckpointError: what the run itself would end with at its start.
    """
    checkpoint = open_checkpoint(recipe.base, recipe.adapters)
    shape = shape_of(checkpoint.config)
    if shape is None:
        raise UnsupportedArchitecture(
            f"{recipe.base} has no row in unmask.encoder.model.architectures; it cannot be trained"
        )
    sets, _ = load_data(recipe, data, log)
    found = {examples.source.name: examples for examples in sets}
    weights = np.array([s.weight or len(found[s.name].train) for s in recipe.data], dtype=float)
    shares = weights / weights.sum()
    sources = [
        _source_plan(source, found.get(source.name), float(share), recipe, checkpoint.tokenizer.text)
        for source, share in zip(recipe.data, shares, strict=True)
    ]
    per_step = sum(s.share * s.examples_per_step * s.tokens_per_example for s in sources)
    tokens = int(per_step * recipe.steps)
    device = choose_device(recipe.device)
    dtype = compute_dtype(recipe.precision, device)
    trained = _trained(shape, recipe)
    # Forward once, backward once through the frozen weights, and once more for the gradients of trained ones.
    passes = 2.1 if recipe.lora is not None else 3.0
    if per_step > recipe.batch.forward_tokens and recipe.objective != "mntp":
        passes += 1.0  # GradCache forwards twice
    seconds = tokens * shape.flops_per_token * passes / (_product_speed(device, dtype) * _EFFICIENCY)
    return RunPlan(sources, recipe.steps, tokens, _memory(shape, recipe, dtype, per_step, trained), seconds, trained)


def _source_plan(
    source: DataSource, examples: Examples | None, share: float, recipe: Recipe, tokenizer: Tokenizer
) -> SourcePlan:
    longest = source.max_length or recipe.max_length
    size = source.batch or recipe.batch.size
    if examples is None:
        return SourcePlan(source.name, None, 0, float(longest), size, share)
    lengths = [_tokens(example, recipe, source, tokenizer, longest) for example in examples.train[:_SAMPLE]]
    return SourcePlan(source.name, len(examples.train), len(examples.held_out), float(np.mean(lengths)), size, share)


def _tokens(example: Example, recipe: Recipe, source: DataSource, tokenizer: Tokenizer, longest: int) -> int:
    texts = [example.query] * (2 if example.label is not None else 1)
    if example.positive is not None:
        texts += [example.positive, *example.negatives[: recipe.contrastive.hard_negatives]]
    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    if recipe.objective == "mntp":
        return sum(counts)
    asked = len(tokenizer.encode(source.instruction).ids) if source.instruction else 0
    with_instruction = len(counts) if source.symmetric else 1
    counts = [min(longest, count + (asked if i < with_instruction else 0)) for i, count in enumerate(counts)]
    return sum(counts) * (2 if recipe.objective == "simcse" else 1)


def _trained(shape: Shape, recipe: Recipe) -> int:
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ends = {
        "q_proj": (shape.hidden_size, query),
        "k_proj": (shape.hidden_size, value),
        "v_proj": (shape.hidden_size, value),
        "o_proj": (query, shape.hidden_size),
        "gate_proj": (shape.hidden_size, shape.intermediate_size),
        "up_proj": (shape.hidden_size, shape.intermediate_size),
        "down_proj": (shape.intermediate_size, shape.hidden_size),
    }
    if recipe.lora is not None:
        return shape.layers * recipe.lora.rank * sum(sum(ends[target]) for target in recipe.lora.targets)
    return shape.layers * sum(a * b for a, b in ends.values()) + shape.vocabulary * shape.hidden_size


def _memory(shape: Shape, recipe: Recipe, dtype: torch.dtype, per_step: float, trained: int) -> int:
    weights = int(shape.flops_per_token / 2) + shape.vocabulary * shape.hidden_size
    # With adapters: W0 in float32 and the sum in the forward's precision. Adam: weight, gradient, two moments.
    held = weights * (4 + dtype.itemsize if recipe.lora is not None else 4) + trained * 16
    # Kept for the backward of one layer, per token: the inputs of its products, norms in float32, heads twice, the MLP.
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = (
        dtype.itemsize * (4 * shape.hidden_size + 2 * heads + 4 * shape.intermediate_size) + 4 * 2 * shape.hidden_size
    )
    if recipe.gradient_checkpointing:
        layer = dtype.itemsize * shape.hidden_size
    return int(held + min(per_step, recipe.batch.forward_tokens) * layer * shape.layers)


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of the usual shape, best of a few."""
    a, b = torch.randn(1024, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        del product
    return 2 * 1024**3 / best
