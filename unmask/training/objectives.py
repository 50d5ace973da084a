"""The objectives: each takes the batch of one step and computes gradients.

Randomness other than dropout (the choice of masked tokens) depends only on the seed and the step's number, so that a
resumed run equals an uninterrupted one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.encoder.prompts import Prompt
from unmask.training.distillation_settings import Distillation, Ranking
from unmask.training.gradcache import backward_through
from unmask.training.losses import (
    false_negatives,
    info_nce,
    matryoshka,
    ranking,
    same_text,
    similarity_loss,
    vector_distance,
)
from unmask.training.mixture import Part, TextBatch
from unmask.training.mntp import (
    LanguageModelHead,
    MaskedSequence,
    blocks,
    language_model_head,
    mask_token_id,
    mask_tokens,
    prediction_loss,
)
from unmask.training.recipe import Contrastive, DataSource, Exit, Mntp, Recipe
from unmask.training.targets import RankingTeacher
from unmask.training.training_model import TrainingModel


@dataclass(frozen=True, slots=True)
class StepReport:
    """Loss of one step, and its number of tokens (each counted once, also if GradCache computes it twice)."""

    loss: float
    tokens: int


Objective = Callable[[TextBatch, int], StepReport]


@dataclass(frozen=True)
class Teachers:
    """Teachers to learn from besides the labels.

    Attributes:
        targets: maps texts to their target vectors [N, W'].
        ranking: scores passages for queries, for data with both.
    """

    targets: Callable[[Sequence[str]], np.ndarray]
    ranking: RankingTeacher | None = None


class SupervisedSettings(Protocol):
    """The part of a recipe that supervised training reads; see `Recipe` for the fields."""

    @property
    def contrastive(self) -> Contrastive: ...

    @property
    def distillation(self) -> Distillation | None: ...

    @property
    def matryoshka(self) -> Sequence[int]: ...

    @property
    def exits(self) -> Sequence[Exit]: ...


def objective_for(recipe: Recipe, model: TrainingModel, teachers: Teachers | None) -> Objective:
    """Return the recipe's objective, bound to a model."""
    if recipe.objective == "mntp":
        return _mntp(recipe.mntp, recipe.seed, model)
    if recipe.objective == "simcse":
        return lambda batch, step: simcse(batch, recipe.simcse.temperature, recipe.matryoshka, model)
    return lambda batch, step: supervised(batch, recipe, model, teachers)


@dataclass(frozen=True)
class _Candidates:
    """Queries and candidates of one data set within a batch.

    Attributes:
        rows: row in the batch of each query's vector, then of each positive's and each negative's: [Q + C].
        queries: number of queries, Q.
        masked: [Q, C], candidates that do not count as negatives of a query.
        hard: [Q, C], the negatives that the data gives to a query.
        scores: the ranking teacher's cosines [Q, C], if there is one.
        share: share of the batch's queries.
    """

    source: DataSource
    rows: Tensor
    queries: int
    masked: Tensor
    hard: Tensor
    scores: Tensor | None
    share: float


def supervised(
    batch: TextBatch, settings: SupervisedSettings, model: TrainingModel, teachers: Teachers | None
) -> StepReport:
    """Train on labels (contrastive loss), on a teacher's vectors of all texts (distillation), or both."""
    distillation = settings.distillation
    prompts: list[Prompt] = []
    row_of: dict[tuple[str, str, int | None], int] = {}  # instruction, text, length -> row of its vector
    distilled: dict[int, str] = {}
    candidates: list[_Candidates] = []
    examples = sum(len(part.examples) for part in batch.parts)
    for part in batch.parts:
        source = part.source
        queries = [example.query for example in part.examples]
        positives = [example.positive for example in part.examples if example.positive is not None]
        hard = [example.negatives[: settings.contrastive.hard_negatives] for example in part.examples]
        documents = positives + [text for texts in hard for text in texts]
        # Symmetric sets get the instruction on both sides, which the reference intended and lost (PR 60).
        keys = [(source.instruction, text) for text in queries]
        keys += [(source.instruction if source.symmetric else "", text) for text in documents]
        unseen = [key for key in dict.fromkeys(keys) if (*key, source.max_length) not in row_of]
        row_of.update(((*key, source.max_length), len(prompts) + i) for i, key in enumerate(unseen))
        prompts += _prompts(unseen, model, source.max_length)
        rows = [row_of[*key, source.max_length] for key in keys]
        if teachers is not None and source.use_teacher:
            distilled.update((row, text) for row, (_, text) in zip(rows, keys, strict=True))
        if len(positives) == len(queries):
            share = len(queries) / examples
            owners = [query for query, texts in enumerate(hard) for _ in texts]
            candidates.append(_candidates(part, rows, queries, documents, owners, share, model, teachers))
    places = torch.tensor(sorted(distilled), dtype=torch.long, device=model.device)  # [D]
    targets = None
    if teachers is not None and len(distilled):
        targets = _gathered(model, teachers.targets, [distilled[row] for row in sorted(distilled)])  # [D, W']

    def loss_of(vectors: Tensor) -> Tensor:  # [U, w] -> scalar
        loss = vectors.new_zeros(())
        if targets is not None and distillation is not None:
            loss = loss + _distillation(vectors[places], targets, distillation)
        for each in candidates:
            judge = _judge(each, vectors, places, targets)
            loss = loss + each.share * _candidates_loss(each, vectors, settings.contrastive, judge)
            if each.scores is not None and distillation is not None and distillation.ranking is not None:
                loss = loss + each.share * _ranking_loss(each, each.scores, vectors, distillation.ranking)
        return loss

    def loss_of_depths(vectors: Tensor) -> Tensor:  # [U, depths * W] -> scalar
        full, *early = (matryoshka(loss_of, v, settings.matryoshka) for v in vectors.split(model.dimensions, dim=1))
        return full + sum(each.weight * loss for each, loss in zip(settings.exits, early, strict=True))

    loss = backward_through(model, prompts, loss_of_depths)
    return StepReport(loss, sum(len(prompt.ids) for prompt in prompts))


def _candidates(
    part: Part,
    rows: list[int],
    queries: list[str],
    documents: list[str],
    owners: list[int],
    share: float,
    model: TrainingModel,
    teachers: Teachers | None,
) -> _Candidates:
    masked = same_text(queries, documents, model.device)
    if part.source.label is not None:
        labels = [str(example.label) for example in part.examples]
        masked[:, : len(labels)] |= same_text(labels, labels, model.device)
    hard = torch.zeros_like(masked)
    hard[owners, range(len(queries), len(documents))] = True
    scores = None
    if teachers is not None and teachers.ranking is not None and part.source.use_teacher:
        q = _gathered(model, teachers.ranking.queries, queries)
        scores = q @ _gathered(model, teachers.ranking.documents, documents).T  # [Q, C]
    places = torch.tensor(rows, device=model.device)
    return _Candidates(part.source, places, len(queries), masked, hard, scores, share)


def _distillation(vectors: Tensor, targets: Tensor, settings: Distillation) -> Tensor:
    loss = similarity_loss(vectors, targets, settings.temperature, settings.weight, settings.similarity_weight)
    if settings.vector_weight:
        loss = loss + settings.vector_weight * vector_distance(vectors, targets)
    return loss


def _judge(each: _Candidates, vectors: Tensor, places: Tensor, targets: Tensor | None) -> Tensor:
    """Return the vectors that decide on false negatives: the teacher's, else the model's own, [Q + C, w]."""
    if targets is None or not each.source.use_teacher:
        return vectors[each.rows].detach()
    return targets[torch.searchsorted(places, each.rows)]


def _candidates_loss(each: _Candidates, vectors: Tensor, settings: Contrastive, judge: Tensor) -> Tensor:
    count = each.queries
    own = vectors[each.rows]  # [Q + C, w]
    loss = own.new_zeros(())
    if each.source.use_labels and settings.weight:
        masked = each.masked
        if settings.false_negative_margin is not None:
            too_near = false_negatives(judge[:count], judge[count:], settings.false_negative_margin)
            masked = masked | (too_near & ~each.hard)
        both = settings.both_ways and each.source.symmetric
        loss = settings.weight * info_nce(own[:count], own[count:], settings.temperature, masked, both)
    return loss


def _ranking_loss(each: _Candidates, teacher: Tensor, vectors: Tensor, settings: Ranking) -> Tensor:
    own, count = F.normalize(vectors[each.rows], dim=1), each.queries
    scores = own[:count] @ own[count:].T  # [Q, C]
    return settings.weight * ranking(scores, teacher, settings.temperature)


def _gathered(model: TrainingModel, vectors: Callable[[Sequence[str]], np.ndarray], texts: list[str]) -> Tensor:
    """Look up vectors of texts, [N, W']. Each process looks up its share and gets all."""
    processes = model.processes
    own = range(processes.rank, len(texts), processes.size)
    rows = torch.from_numpy(vectors([texts[i] for i in own])).to(model.device)
    return processes.gather(rows, own, len(texts))


def simcse(batch: TextBatch, temperature: float, lengths: Sequence[int], model: TrainingModel) -> StepReport:
    """Compute a step of SimCSE: each text is its own positive, and dropout makes the two views differ.

    Args:
        lengths: also train vectors truncated to these lengths, see `losses.matryoshka`.
    """
    prompts: list[Prompt] = []
    for part in batch.parts:
        texts = dict.fromkeys(example.query for example in part.examples)
        prompts += _prompts([(part.source.instruction, text) for text in texts], model, part.source.max_length)

    def loss_of(vectors: Tensor) -> Tensor:
        first, second = vectors.split(len(prompts))
        return info_nce(first, second, temperature)

    loss = backward_through(model, prompts * 2, lambda v: matryoshka(loss_of, v, lengths))
    return StepReport(loss, 2 * sum(len(prompt.ids) for prompt in prompts))


def _mntp(settings: Mntp, seed: int, model: TrainingModel) -> Objective:
    head, mask_id = language_model_head(model), mask_token_id(model.encoder.checkpoint, settings)
    vocabulary = model.decoder.shape.vocabulary
    tokenizer = model.encoder.checkpoint.tokenizer

    def step(batch: TextBatch, number: int) -> StepReport:
        generator = np.random.default_rng([seed, 1, number])
        encodings = tokenizer.plain.encode_batch_fast(
            [example.query for part in batch.parts for example in part.examples], add_special_tokens=False
        )
        documents = [np.array([*tokenizer.prefix, *encoding.ids], dtype=np.int64) for encoding in encodings]
        sequences = [
            mask_tokens(ids, settings, mask_id, vocabulary, generator) for ids in blocks(documents, settings.block)
        ]
        num_masked = sum(len(sequence.positions) for sequence in sequences)
        loss = 0.0
        for micro_batch in model.micro_batches([len(sequence.ids) for sequence in sequences]):
            if micro_batch:
                loss += _mntp_pack([sequences[i] for i in micro_batch], num_masked, model, head)
            else:
                (model.hidden([sequences[0].ids]).sum() * 0.0).backward()
        return StepReport(model.processes.sum(loss), sum(len(sequence.ids) for sequence in sequences))

    return step


def _mntp_pack(
    sequences: list[MaskedSequence], num_masked: int, model: TrainingModel, head: LanguageModelHead
) -> float:
    states = model.hidden([sequence.ids for sequence in sequences])  # [T, W]
    starts = np.cumsum([0, *(len(sequence.ids) for sequence in sequences[:-1])])
    before = np.concatenate([start + each.positions - 1 for start, each in zip(starts, sequences, strict=True)])
    targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences])).to(model.device)
    # Divided by the step's masked tokens, not the pack's, so that packs add up to the gradient of one large forward.
    loss = prediction_loss(states[torch.from_numpy(before).to(model.device)], targets, head) / num_masked
    loss.backward()
    return float(loss.detach())


def _prompts(keys: Sequence[tuple[str, str]], model: TrainingModel, max_length: int | None) -> list[Prompt]:
    """Build prompts of (instruction, text) keys, in their order; those of one instruction are built together."""
    prompts: dict[int, Prompt] = {}
    for instruction in dict.fromkeys(instruction for instruction, _ in keys):
        indices = [i for i, (own, _) in enumerate(keys) if own == instruction]
        built = model.prompts([keys[i][1] for i in indices], instruction, max_length)
        prompts.update(zip(indices, built, strict=True))
    return [prompts[i] for i in range(len(keys))]
