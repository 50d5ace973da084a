"""What a step does with a batch of texts: one function per objective, each leaving gradients behind.

A step's randomness beyond dropout (which tokens are masked) follows from the seed and the step's number, so that a
resumed run does what the unbroken one would have done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmask.encoder.prompts import Prompt
from unmask.recipe.losses import distil, false_negatives, info_nce, matryoshka, same_text
from unmask.recipe.mixture import TextBatch
from unmask.recipe.mntp import Gaps, Head, blocks, head_of, mask, mask_id_of, prediction_loss
from unmask.recipe.recipe import Recipe
from unmask.recipe.trainee import Trainee, backward_through


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step saw: its loss, and the tokens that went forward (once, however often they are recomputed)."""

    loss: float
    tokens: int


Teacher = Callable[[Sequence[str]], np.ndarray]  # texts -> [n, W']
Objective = Callable[[TextBatch, int], StepReport]


def objective_for(recipe: Recipe, trainee: Trainee, teacher: Teacher | None) -> Objective:
    """The objective a recipe names, bound to the model it trains."""
    if recipe.objective == "mntp":
        return _mntp(recipe, trainee)
    if recipe.objective == "simcse":
        return lambda batch, step: simcse(batch, recipe, trainee)
    return lambda batch, step: supervised(batch, recipe, trainee, teacher)


def supervised(batch: TextBatch, recipe: Recipe, trainee: Trainee, teacher: Teacher | None) -> StepReport:
    """Contrastive loss over labels, distillation over all texts of the batch, or both."""
    source, settings = batch.source, recipe.contrastive
    queries = [example.query for example in batch.examples]
    positives = [example.positive for example in batch.examples if example.positive is not None]
    negatives = [text for example in batch.examples for text in example.negatives[: settings.hard_negatives]]
    contrast = source.contrast and settings.weight > 0 and len(positives) == len(queries)
    documents = positives + negatives
    # Symmetric sets are asked about in the same words on both sides. The reference meant to and lost it (PR 60).
    asked = [(source.instruction, text) for text in queries]
    asked += [(source.instruction if source.symmetric else "", text) for text in documents]
    unique = list(dict.fromkeys(asked))
    place = {key: index for index, key in enumerate(unique)}
    rows = torch.tensor([place[key] for key in asked], device=trainee.device)  # [Q + C]
    prompts = _prompts(unique, trainee, source.max_length)
    taught = None
    if teacher is not None and source.distil:
        processes = trainee.processes
        own = range(processes.rank, len(unique), processes.size)  # each process asks about its share
        answers = torch.from_numpy(teacher([unique[i][1] for i in own])).to(trainee.device)
        taught = processes.gather(answers, own, len(unique))
    masked = same_text(queries, documents, trainee.device) if contrast else None
    if masked is not None and source.label is not None:
        labels = [example.label for example in batch.examples]
        masked |= same_text([str(label) for label in labels], [str(label) for label in labels], trainee.device)
    count = len(queries)

    def loss_of(vectors: Tensor) -> Tensor:  # [U, w] -> scalar
        loss = vectors.new_zeros(())
        if taught is not None and recipe.distillation is not None:
            d = recipe.distillation
            loss = loss + distil(vectors, taught, d.temperature, d.weight, d.similarity_weight)
        if contrast:
            each = vectors[rows]  # [Q + C, w]
            wrong = masked
            if settings.false_negative_margin is not None:
                judge = each.detach() if taught is None else taught[rows]
                near = false_negatives(judge[:count], judge[count:], settings.false_negative_margin)
                wrong = near if wrong is None else wrong | near
            both = settings.both_ways and source.symmetric
            nce = info_nce(each[:count], each[count:], settings.temperature, wrong, both)
            loss = loss + settings.weight * nce
        return loss

    loss = backward_through(trainee, prompts, lambda v: matryoshka(loss_of, v, recipe.matryoshka))
    return StepReport(loss, sum(len(prompt.ids) for prompt in prompts))


def simcse(batch: TextBatch, recipe: Recipe, trainee: Trainee) -> StepReport:
    """Each text is its own positive; dropout makes the two views differ."""
    texts = list(dict.fromkeys(example.query for example in batch.examples))
    prompts = _prompts([(batch.source.instruction, text) for text in texts], trainee, batch.source.max_length)

    def loss_of(vectors: Tensor) -> Tensor:
        first, second = vectors.split(len(texts))
        return info_nce(first, second, recipe.simcse.temperature)

    loss = backward_through(trainee, prompts * 2, lambda v: matryoshka(loss_of, v, recipe.matryoshka))
    return StepReport(loss, 2 * sum(len(prompt.ids) for prompt in prompts))


def _mntp(recipe: Recipe, trainee: Trainee) -> Objective:
    head, mask_id = head_of(trainee), mask_id_of(trainee, recipe.mntp)
    vocabulary = trainee.decoder.shape.vocabulary
    tokenizer = trainee.encoder.checkpoint.tokenizer

    def step(batch: TextBatch, number: int) -> StepReport:
        generator = np.random.default_rng([recipe.seed, 1, number])
        encodings = tokenizer.text.encode_batch_fast([e.query for e in batch.examples], add_special_tokens=False)
        documents = [np.array([*tokenizer.prefix, *encoding.ids], dtype=np.int64) for encoding in encodings]
        gaps = [mask(ids, recipe.mntp, mask_id, vocabulary, generator) for ids in blocks(documents, recipe.mntp.block)]
        asked = sum(len(gap.positions) for gap in gaps)
        loss = 0.0
        for turn in trainee.turns([len(gap.ids) for gap in gaps]):
            if turn:
                loss += _mntp_pack([gaps[i] for i in turn], asked, trainee, head)
            else:
                (trainee.hidden([gaps[0].ids]).sum() * 0.0).backward()
        return StepReport(trainee.processes.sum(loss), sum(len(gap.ids) for gap in gaps))

    return step


def _mntp_pack(gaps: list[Gaps], asked: int, trainee: Trainee, head: Head) -> float:
    states = trainee.hidden([gap.ids for gap in gaps])  # [T, W]
    starts = np.cumsum([0, *(len(gap.ids) for gap in gaps[:-1])])
    before = np.concatenate([start + gap.positions - 1 for start, gap in zip(starts, gaps, strict=True)])
    targets = torch.from_numpy(np.concatenate([gap.targets for gap in gaps])).to(trainee.device)
    # Divided by the step's gaps, not the pack's: packs then add up to exactly the gradient of one large forward.
    loss = prediction_loss(states[torch.from_numpy(before).to(trainee.device)], targets, head) / asked
    loss.backward()
    return float(loss.detach())


def _prompts(asked: Sequence[tuple[str, str]], trainee: Trainee, max_length: int | None) -> list[Prompt]:
    """Prompts in the order asked, built together where they share an instruction."""
    found: dict[int, Prompt] = {}
    for instruction in dict.fromkeys(instruction for instruction, _ in asked):
        indices = [i for i, (given, _) in enumerate(asked) if given == instruction]
        built = trainee.prompts([asked[i][1] for i in indices], instruction, max_length)
        found.update(zip(indices, built, strict=True))
    return [found[i] for i in range(len(asked))]
