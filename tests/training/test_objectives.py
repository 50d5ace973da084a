"""Tests of the objectives: instructions, negatives, teachers and masks of a step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.tiny import CPU, distance, gradients, off_start, recipe_of, texts_of
from unmask.training.examples import Example
from unmask.training.losses import false_negatives, info_nce, similarity_loss
from unmask.training.mixture import Part, TextBatch
from unmask.training.objectives import StepReport, Teachers, simcse, supervised
from unmask.training.recipe import Recipe
from unmask.training.training_model import TrainingModel

Q, P, N = texts_of(5, 1), texts_of(5, 2), texts_of(10, 3)


def pairs(negatives: int = 2) -> list[Example]:
    return [Example(q, p, tuple(N[2 * i : 2 * i + negatives])) for i, (q, p) in enumerate(zip(Q, P, strict=True))]


def source(**fields: Any) -> dict[str, Any]:
    return {"name": "pairs", "path": "x.tsv", "query": "q", "positive": "p", **fields}


def model_of(recipe: Recipe) -> TrainingModel:
    return off_start(TrainingModel(recipe, CPU))


def step(recipe: Recipe, examples: list[Example], teacher: Any = None) -> tuple[StepReport, TrainingModel]:
    model = model_of(recipe)
    return supervised(
        TextBatch([Part(recipe.data[0], examples)]), recipe, model, None if teacher is None else Teachers(teacher)
    ), model


def vectors(model: TrainingModel, texts: Sequence[str], instruction: str = "") -> torch.Tensor:
    return model.vectors(model.prompts(texts, instruction))


@pytest.mark.parametrize("symmetric", [False, True])
def test_symmetric_sets_have_the_instruction_on_both_sides(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference compared the names of its data sets with names they no longer had, and lost the second side."""
    recipe = recipe_of(data=[source(instruction="Find the same:", symmetric=symmetric)])
    model = model_of(recipe)
    instructions: dict[str, str] = {}
    build = model.prompts

    def watched(texts: Sequence[str], instruction: str, max_length: int | None = None) -> Any:
        instructions.update(dict.fromkeys(texts, instruction))
        return build(texts, instruction, max_length)

    monkeypatch.setattr(model, "prompts", watched)
    report = supervised(TextBatch([Part(recipe.data[0], pairs(1))]), recipe, model, None)
    documents = "Find the same:" if symmetric else ""
    assert instructions == dict.fromkeys(Q, "Find the same:") | dict.fromkeys([*P, *N[::2]], documents)
    # And the loss is that of exactly those vectors, with the positives asked for their queries where sides are equal.
    candidates = torch.cat([vectors(model, P, documents), vectors(model, N[::2], documents)])
    expected = info_nce(vectors(model, Q, "Find the same:"), candidates, 0.02, both_ways=symmetric)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_any_number_of_hard_negatives(negatives: int) -> None:
    recipe = recipe_of(data=[source()], contrastive={"hard_negatives": negatives})
    report, model = step(recipe, pairs())
    candidates = [vectors(model, P)]
    hard = [text for i in range(5) for text in N[2 * i : 2 * i + negatives]]
    if hard:
        candidates.append(vectors(model, hard))
    expected = info_nce(vectors(model, Q), torch.cat(candidates), 0.02)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)
    prompts = model.prompts([*Q, *P, *hard], "")
    assert report.tokens == sum(len(prompt.ids) for prompt in prompts)


def test_a_text_that_occurs_twice_is_encoded_once_and_is_no_negative() -> None:
    examples = [
        Example("same query here", "one answer"),
        Example("another query", "one answer"),
        Example("third", "x y"),
    ]
    report, model = step(recipe_of(data=[source()]), examples)
    texts = ["same query here", "another query", "third", "one answer", "x y"]
    assert report.tokens == sum(len(prompt.ids) for prompt in model.prompts(texts, ""))
    v = vectors(model, texts)
    masked = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    assert report.loss == pytest.approx(float(info_nce(v[:3], v[[3, 3, 4]], 0.02, masked)), rel=1e-4)


def test_texts_of_one_label_are_no_negatives() -> None:
    recipe = recipe_of(data=[{"name": "l", "path": "x.tsv", "text": "t", "label": "l"}])
    examples = [Example(q, p, (), label) for q, p, label in zip(Q, P, "aabbc", strict=True)]
    report, model = step(recipe, examples)
    masked = torch.tensor([[a == b for b in "aabbc"] for a in "aabbc"])
    expected = info_nce(vectors(model, Q), vectors(model, P), 0.02, masked)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)


def teacher(texts: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), text.count("e"), text.count("s") + 1.0, 2.0] for text in texts], dtype=np.float32)


@pytest.mark.parametrize("taught", [False, True])
def test_false_negatives_are_judged_by_the_teacher_if_there_is_one(taught: bool) -> None:
    distillation = {"teacher": "t", "weight": 0.0} if taught else None
    recipe = recipe_of(data=[source()], contrastive={"false_negative_margin": 0.02}, distillation=distillation)
    report, model = step(recipe, pairs(1), teacher if taught else None)
    q, c = vectors(model, Q), vectors(model, [*P, *N[::2]])
    judges = (torch.from_numpy(teacher(Q)), torch.from_numpy(teacher([*P, *N[::2]]))) if taught else (q, c)
    masked = false_negatives(*judges, 0.02)
    own = torch.cat([torch.zeros(5, 5), torch.eye(5)], dim=1).bool()  # which the data gives, so they count
    assert (masked & own).any() and (masked & ~own).any()
    assert report.loss == pytest.approx(float(info_nce(q, c, 0.02, masked & ~own)), rel=1e-4)


def test_distillation_and_labels_add_up_over_every_length() -> None:
    recipe = recipe_of(
        data=[source()],
        matryoshka=[16, 64, 4],
        contrastive={"weight": 0.3, "temperature": 0.05},
        distillation={"teacher": "t", "temperature": 0.1, "weight": 2.0, "similarity_weight": 5.0},
    )
    report, model = step(recipe, pairs(1), teacher)
    computed = gradients(model)
    texts = [*Q, *P, *N[::2]]
    v, taught = vectors(model, texts), torch.from_numpy(teacher(texts))
    lengths = (64, 16, 4)
    expected = torch.zeros(())
    for cut in (v[:, :length] for length in lengths):
        expected = expected + similarity_loss(cut, taught, 0.1, 2.0, 5.0) + 0.3 * info_nce(cut[:5], cut[5:], 0.05)
    expected = expected / len(lengths)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)
    expected.backward()
    assert distance(computed, gradients(model)) < 1e-4


def test_texts_alone_learn_from_the_teacher_alone() -> None:
    data = [{"name": "t", "path": "x.tsv", "text": "t"}]
    recipe = recipe_of(data=data, distillation={"teacher": "t"})
    report, model = step(recipe, [Example(q) for q in Q], teacher)
    expected = similarity_loss(vectors(model, Q), torch.from_numpy(teacher(Q)), 0.05, 1.0, 0.0)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)


def test_a_set_may_be_kept_from_the_teacher_or_from_its_labels() -> None:
    data = [source(use_teacher=False)]
    report, model = step(recipe_of(data=data, distillation={"teacher": "t"}), pairs(0), None)
    assert report.loss == pytest.approx(float(info_nce(vectors(model, Q), vectors(model, P), 0.02)), rel=1e-4)
    data = [source(use_labels=False)]
    report, model = step(recipe_of(data=data, distillation={"teacher": "t"}), pairs(0), teacher)
    expected = similarity_loss(vectors(model, [*Q, *P]), torch.from_numpy(teacher([*Q, *P])), 0.05, 1.0, 0.0)
    assert report.loss == pytest.approx(float(expected), rel=1e-4)


def test_a_batch_of_one_text_is_no_error() -> None:
    data = [{"name": "t", "path": "x.tsv", "text": "t"}]
    report, _ = step(recipe_of(data=data, distillation={"teacher": "t"}), [Example("one"), Example("one")], teacher)
    assert report.loss == 0.0


def test_a_set_may_have_its_own_length() -> None:
    report, _ = step(recipe_of(data=[source(max_length=4)]), pairs(1))
    assert report.tokens <= 15 * 4


def test_simcse_tells_two_views_of_a_text_from_the_other_texts() -> None:
    recipe = recipe_of("simcse", simcse={"attention_dropout": 0.3})
    model = model_of(recipe)
    model.decoder.train()
    batch = TextBatch([Part(recipe.data[0], [Example(text) for text in [*Q, Q[0]]])])
    torch.manual_seed(0)
    report = simcse(batch, recipe.simcse.temperature, recipe.matryoshka, model)
    torch.manual_seed(0)
    first, second = model.vectors(sorted(model.prompts([*Q, *Q], ""), key=lambda p: -len(p.ids))).split((5, 5))
    assert 0 < report.loss < 10
    assert report.tokens == 2 * sum(len(prompt.ids) for prompt in model.prompts(Q, ""))
    assert first.shape == second.shape
    model.decoder.eval()  # without dropout, both views are one
    model.merge()
    report = simcse(batch, recipe.simcse.temperature, recipe.matryoshka, model)
    v = vectors(model, Q)
    assert report.loss == pytest.approx(float(info_nce(v, v, 0.05)), rel=1e-4)
