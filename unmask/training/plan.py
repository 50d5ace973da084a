"""Estimate a run without training: examples, tokens, memory, time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from unmask.checkpoint import open_checkpoint
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.encoder.shear import shear
from unmask.errors import UnsupportedArchitecture
from unmask.training.checks import check_run
from unmask.training.device import choose_device, compute_dtype
from unmask.training.examples import Example, Examples
from unmask.training.recipe import DataSource, Recipe
from unmask.training.train import load_data

_SAMPLE = 200
# Speed of a whole step as a share of the GEMM speed, measured on CPUs with the shipped recipe.
_EFFICIENCY = 0.6


@dataclass(frozen=True)
class SourcePlan:
    """Estimate of one data set: examples (None if streamed), mean tokens of an example, share of the steps."""

    name: str
    examples: int | None
    held_out: int
    tokens_per_example: float
    examples_per_step: int
    share: float


@dataclass(frozen=True)
class RunPlan:
    """Estimate of a whole run.

    Attributes:
        sources: per data set.
        tokens: tokens of all steps' forwards.
        memory_bytes: weights, optimiser and the activations of one forward.
        seconds: training time, from this machine's GEMM speed, which is measured now.
        trained: number of parameters that the optimiser updates.
        dimensions: length of the vectors.
    """

    sources: list[SourcePlan]
    steps: int
    tokens: int
    memory_bytes: int
    seconds: float
    trained: int
    dimensions: int


def plan_run(recipe: Recipe, data: Path, log: Callable[[str], None], base_dimensions: int | None = None) -> RunPlan:
    """Read the data, count the tokens of a sample, and estimate. Writes nothing and reads no weights.

    Args:
        base_dimensions: length of the base's vectors if a stage before this one writes it; default: read from it.

    Raises:
        UsageError, CheckpointError: as the run itself would raise at its start.
    """
    checkpoint = open_checkpoint(recipe.base, recipe.adapters)
    if recipe.layers is not None:
        checkpoint = shear(checkpoint, recipe.layers)
    shape = shape_of(checkpoint.config)
    if shape is None:
        raise UnsupportedArchitecture(
            f"{recipe.base} has no row in unmask.encoder.model.architectures; it cannot be trained"
        )
    sets, _ = load_data(recipe, data, log)
    dimensions = check_run(recipe, data, sets, base_dimensions)
    examples_of = {examples.source.name: examples for examples in sets}
    weights = np.array([s.weight or len(examples_of[s.name].train) for s in recipe.data], dtype=float)
    shares = weights / weights.sum()
    counter = _TokenCounter(
        checkpoint.tokenizer.text, recipe.objective, recipe.max_length, recipe.contrastive.hard_negatives
    )
    sources = [
        _source_plan(source, examples_of.get(source.name), float(share), recipe.batch.size, counter)
        for source, share in zip(recipe.data, shares, strict=True)
    ]
    per_step = sum(s.share * s.examples_per_step * s.tokens_per_example for s in sources)
    tokens = int(per_step * recipe.steps)
    device = choose_device(recipe.device)
    dtype = compute_dtype(recipe.precision, device)
    trained = _trained_parameters(shape, recipe)
    # Forward once, backward once through the frozen weights, and once more for the gradients of trained ones.
    passes = 2.1 if recipe.lora is not None else 3.0
    if per_step > recipe.batch.forward_tokens and recipe.objective != "mntp":
        passes += 1.0  # GradCache forwards twice
    seconds = tokens * shape.flops_per_token * passes / (_gemm_speed(device, dtype) * _EFFICIENCY)
    memory = _weight_bytes(shape, dtype, trained, adapted=recipe.lora is not None)
    per_token = _activation_bytes(shape, dtype, recipe.gradient_checkpointing)
    memory += int(min(per_step, recipe.batch.forward_tokens) * per_token)
    return RunPlan(sources, recipe.steps, tokens, memory, seconds, trained, dimensions)


@dataclass(frozen=True)
class _TokenCounter:
    """Counts the tokens of an example's forwards, for one objective.

    Attributes:
        max_length: tokens per sequence, where the data set says nothing else.
        hard_negatives: number of hard negatives per example that are encoded.
    """

    tokenizer: Tokenizer
    objective: str
    max_length: int
    hard_negatives: int

    def max_length_of(self, source: DataSource) -> int:
        return source.max_length or self.max_length

    def count(self, example: Example, source: DataSource) -> int:
        texts = [example.query] * (2 if example.label is not None else 1)
        if example.positive is not None:
            texts += [example.positive, *example.negatives[: self.hard_negatives]]
        counts = [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if self.objective == "mntp":
            return sum(counts)
        instruction = len(self.tokenizer.encode(source.instruction).ids) if source.instruction else 0
        with_instruction = len(counts) if source.symmetric else 1
        counts = [
            min(self.max_length_of(source), count + (instruction if i < with_instruction else 0))
            for i, count in enumerate(counts)
        ]
        return sum(counts) * (2 if self.objective == "simcse" else 1)


def _source_plan(
    source: DataSource, examples: Examples | None, share: float, batch_size: int, counter: _TokenCounter
) -> SourcePlan:
    size = source.batch or batch_size
    if examples is None:
        return SourcePlan(source.name, None, 0, float(counter.max_length_of(source)), size, share)
    lengths = [counter.count(example, source) for example in examples.train[:_SAMPLE]]
    return SourcePlan(source.name, len(examples.train), len(examples.held_out), float(np.mean(lengths)), size, share)


def _trained_parameters(shape: Shape, recipe: Recipe) -> int:
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
    head = recipe.head.dimensions * shape.hidden_size if recipe.head is not None and recipe.head.trained else 0
    if recipe.lora is not None:
        return head + shape.layers * recipe.lora.rank * sum(sum(ends[target]) for target in recipe.lora.targets)
    embedding = 0 if recipe.freeze_embedding else shape.vocabulary * shape.hidden_size
    return head + embedding + shape.layers * sum(a * b for a, b in ends.values())


def _weight_bytes(shape: Shape, dtype: torch.dtype, trained: int, *, adapted: bool) -> int:
    weights = int(shape.flops_per_token / 2) + shape.vocabulary * shape.hidden_size
    # With adapters: W0 in float32 and the sum in the forward's precision. Adam: weight, gradient, two moments.
    return weights * (4 + dtype.itemsize if adapted else 4) + trained * 16


def _activation_bytes(shape: Shape, dtype: torch.dtype, gradient_checkpointing: bool) -> int:
    """Return the bytes per token that all layers store for the backward."""
    if gradient_checkpointing:
        return dtype.itemsize * shape.hidden_size * shape.layers
    # Of one layer: the inputs of its GEMMs, norms in float32, heads twice, the MLP.
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = (
        dtype.itemsize * (4 * shape.hidden_size + 2 * heads + 4 * shape.intermediate_size) + 4 * 2 * shape.hidden_size
    )
    return layer * shape.layers


def _gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a GEMM of a usual shape, the fastest of five."""
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
