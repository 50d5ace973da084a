"""Tests of masked next-token prediction: the masked tokens, the states they are predicted from, loss and gradients."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.training.tiny import CPU, GOLDEN, distance, gradients, off_start, recipe_of, texts_of, write_decoder
from unmask.errors import UsageError
from unmask.training.examples import Example
from unmask.training.mixture import Part, TextBatch
from unmask.training.mntp import (
    LanguageModelHead,
    blocks,
    language_model_head,
    mask_token_id,
    mask_tokens,
    prediction_loss,
)
from unmask.training.objectives import objective_for
from unmask.training.recipe import Mntp
from unmask.training.training_model import TrainingModel

IDS = arrays(np.int64, st.integers(2, 200), elements=st.integers(10, 799))


@settings(max_examples=100)
@given(IDS, st.floats(0.01, 0.99), st.sampled_from(["bert", "all"]), st.integers(0, 1000))
def test_masked_positions_and_targets_belong_to_the_sequence(
    ids: np.ndarray, probability: float, masking: Any, seed: int
) -> None:
    before = ids.copy()
    masked = mask_tokens(ids, Mntp(probability=probability, masking=masking), 3, 800, np.random.default_rng(seed))
    assert (ids == before).all()
    assert 1 <= len(masked.positions) < len(ids)
    assert (np.diff(masked.positions) > 0).all()
    assert masked.positions[0] > 0
    assert (masked.targets == ids[masked.positions]).all()
    untouched = np.setdiff1d(np.arange(len(ids)), masked.positions)
    assert (masked.ids[untouched] == ids[untouched]).all()
    assert ((masked.ids >= 0) & (masked.ids < 800)).all()
    if masking == "all":
        assert (masked.ids[masked.positions] == 3).all()
    again = mask_tokens(ids, Mntp(probability=probability, masking=masking), 3, 800, np.random.default_rng(seed))
    assert (again.ids == masked.ids).all()


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_shares_in_the_large(probability: float) -> None:
    ids = np.full(200_000, 500)
    masked = mask_tokens(ids, Mntp(probability=probability), 3, 100_000, np.random.default_rng(0))
    read = masked.ids[masked.positions]
    assert len(read) / len(ids) == pytest.approx(probability, abs=0.01)
    assert (read == 3).mean() == pytest.approx(0.8, abs=0.01)
    assert (read == 500).mean() == pytest.approx(0.1, abs=0.01)
    assert len(np.unique(read)) > 0.05 * len(read)  # the random ones


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 15))
def test_blocks_are_pieces_of_one_document_each(lengths: list[int], length: int) -> None:
    documents = [np.arange(size) + 100 * i for i, size in enumerate(lengths)]
    pieces = blocks(documents, length)
    assert all(1 < len(block) <= length and (np.diff(block) == 1).all() for block in pieces)
    dropped = sum(1 for size in lengths if size and (size % length == 1 or length == 1)) if length > 1 else sum(lengths)
    assert sum(map(len, pieces)) == sum(lengths) - dropped


def head(weight: torch.Tensor, cap: float | None = None) -> LanguageModelHead:
    return LanguageModelHead(weight, torch.nn.Embedding(1, 1), cap)


@pytest.mark.parametrize("rows", [1, 7, 600])  # 600 is more than a chunk
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_is_cross_entropy_over_all_logits(cap: float | None, rows: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(90, 16, requires_grad=True)
    targets = torch.randint(0, 90, (rows,))
    logits = states.double() @ weight.double().T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    loss = prediction_loss(states, targets, head(weight, cap))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(
        torch.autograd.grad(loss * 0.3, (states, weight)),
        torch.autograd.grad(expected * 0.3, (states, weight)),
        strict=True,
    ):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_a_frozen_head_takes_no_gradient() -> None:
    states = torch.randn(5, 16, requires_grad=True)
    prediction_loss(states, torch.arange(5), head(torch.randn(90, 16))).backward()
    assert states.grad is not None


def test_half_precision_is_near() -> None:
    torch.manual_seed(0)
    states, weight, targets = torch.randn(50, 16), torch.randn(90, 16), torch.randint(0, 90, (50,))
    exact = prediction_loss(states, targets, head(weight))
    half = prediction_loss(states.bfloat16(), targets, head(weight.bfloat16()))
    assert float(half) == pytest.approx(float(exact), rel=0.01)


def batch_of(recipe, texts) -> TextBatch:
    return TextBatch([Part(recipe.data[0], [Example(text) for text in texts])])


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "untied"
    return str(write_decoder(folder, head=True, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tied"
    return str(write_decoder(folder, tie_word_embeddings=True, model_type="gemma2", final_logit_softcapping=5.0,
                             query_pre_attn_scalar=8, head_dim=8, sliding_window=None))  # fmt: skip


def by_hand(model: TrainingModel, recipe, texts, weight: torch.Tensor, cap: float | None) -> torch.Tensor:
    """The step's loss from full logits, one document at a time."""
    generator = np.random.default_rng([recipe.seed, 1, 0])
    tokenizer = model.encoder.checkpoint.tokenizer
    total, num_masked = torch.zeros(()), 0
    for text in texts:
        ids = np.array([*tokenizer.prefix, *tokenizer.text.encode(text, add_special_tokens=False).ids])
        for block in blocks([ids], recipe.mntp.block):
            masked = mask_tokens(
                block, recipe.mntp, mask_token_id(model.encoder.checkpoint, recipe.mntp), 800, generator
            )
            logits = model.hidden([masked.ids]) @ weight.T  # logits at i - 1 tell what stands at i
            if cap:
                logits = cap * torch.tanh(logits / cap)
            shifted = logits[:-1][masked.positions - 1]
            total = total + F.cross_entropy(shifted, torch.from_numpy(block[masked.positions]), reduction="sum")
            num_masked += len(masked.positions)
    return total / num_masked


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_step_has_the_exact_gradient_in_any_packs(head: str, lora: Any, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(head)
    texts = [*texts_of(9), "a long one " * 12]
    lora = lora and {**lora, "dropout": 0.0}
    computed: list[dict[str, torch.Tensor]] = []
    for tokens in (10_000, 40):
        recipe = recipe_of("mntp", base=base, lora=lora, batch={"forward_tokens": tokens}, mntp={"block": 20})
        model = off_start(TrainingModel(recipe, CPU))
        report = objective_for(recipe, model, None)(batch_of(recipe, texts), 0)
        computed.append(gradients(model))
        weight = model.decoder.embedding.weight
        if head == "untied":
            weight = model.encoder.checkpoint.tensors.read("lm_head.weight")
            assert weight.shape == (800, 32)
        expected = by_hand(model, recipe, texts, weight, 5.0 if head == "tied" else None)
        assert report.loss == pytest.approx(float(expected), rel=1e-5)
        expected.backward()
        computed.append(gradients(model))
    assert distance(computed[0], computed[1]) < 1e-5
    assert distance(computed[2], computed[1]) < 1e-5
    if lora is None:
        assert computed[0]["embedding.weight"].any()


def test_each_step_masks_other_tokens_and_the_same_step_the_same(untied: str) -> None:
    recipe = recipe_of("mntp", base=untied)
    step = objective_for(recipe, TrainingModel(recipe, CPU), None)
    one, again, other = (step(batch_of(recipe, texts_of(4)), number).loss for number in (0, 0, 1))
    assert one == again != other


def test_documents_without_a_gap_teach_nothing(untied: str) -> None:
    recipe = recipe_of("mntp", base=untied, mntp={"block": 1})
    report = objective_for(recipe, TrainingModel(recipe, CPU), None)(batch_of(recipe, texts_of(4)), 0)
    assert (report.loss, report.tokens) == (0.0, 0)


def test_a_mask_token_must_be_in_the_vocabulary(untied: str) -> None:
    model = TrainingModel(recipe_of("mntp", base=untied), CPU)
    assert mask_token_id(model.encoder.checkpoint, Mntp()) == model.encoder.checkpoint.tokenizer.text.token_to_id("_")
    with pytest.raises(UsageError, match=r"mntp.mask_token='<nothing>' is not one token of"):
        mask_token_id(model.encoder.checkpoint, Mntp(mask_token="<nothing>"))


def test_an_inner_model_has_no_head_to_predict_with() -> None:
    model = TrainingModel(recipe_of("mntp", base=str(GOLDEN / "tiny_llama")), CPU)  # LlamaModel, untied
    with pytest.raises(UsageError, match=r"no language-model head \(lm_head.weight\)"):
        language_model_head(model)
