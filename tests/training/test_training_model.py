"""Tests of the model under training: no causal mask, no attention across sequences, gradients independent of packs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.training.tiny import CPU, distance, gradients, off_start, recipe_of, texts_of
from unmask.encoder import Encoder
from unmask.errors import UnsupportedArchitecture, UsageError
from unmask.training.device import choose_device, compute_dtype
from unmask.training.gradcache import backward_through
from unmask.training.head import first_numbers
from unmask.training.losses import info_nce
from unmask.training.training_model import TrainingModel

TEXTS = texts_of(14)
PHI = SimpleNamespace(config={"model_type": "phi3"})


def model_of(objective: str = "supervised", **fields: Any) -> TrainingModel:
    model = off_start(TrainingModel(recipe_of(objective, **fields), CPU))
    model.decoder.train()
    return model


def loss_of(vectors: torch.Tensor) -> torch.Tensor:
    # Lukewarm: a cold one multiplies the rounding of the vectors, and would not tell a wrong gradient from a right one.
    return info_nce(vectors[:7], vectors[7:], 0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["supervised", "simcse", "mntp"])
def test_while_training_a_token_sees_those_after_it(objective: str, checkpointing: bool) -> None:
    """Causal attention must not slip back in, whichever kernel trains."""
    simcse = {"attention_dropout": 0.0}
    model = model_of(objective, gradient_checkpointing=checkpointing, simcse=simcse)
    ids = np.arange(5, 17)
    other = ids.copy()
    other[-1] = 99
    moved = (model.hidden([ids]) - model.hidden([other])).norm(dim=1)
    assert (moved[:-1] > 1e-4).all()
    states = model.hidden([ids])
    (gradient,) = torch.autograd.grad(states[0].sum(), model.parameters["layers.0.qkv.down"])
    assert gradient.any()


def test_with_attention_dropout_too() -> None:
    model = model_of("simcse", simcse={"attention_dropout": 0.1})
    states = []
    for last in (16, 99):
        torch.manual_seed(0)
        states.append(model.hidden([np.array([*range(5, 16), last])]))
    assert ((states[0] - states[1]).norm(dim=1)[:-1] > 1e-4).all()


def test_the_causal_mask_is_kept_where_an_ablation_asks_for_it() -> None:
    model = model_of(causal=True)
    ids = np.arange(5, 17)
    other = ids.copy()
    other[-1] = 99
    moved = (model.hidden([ids]) - model.hidden([other])).norm(dim=1)
    assert not moved[:-1].any()
    assert moved[-1] > 1e-4


def test_sequences_of_a_pack_do_not_see_each_other() -> None:
    model = model_of()
    first, second = np.arange(5, 17), np.arange(40, 52)
    together = model.hidden([first, second])
    torch.testing.assert_close(together[:12], model.hidden([first]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[12:], model.hidden([second]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 40),
        ({}, 1),
        ({"lora": {"rank": 4, "dropout": 0.3}}, 40),
        ({"lora": None}, 40),
        ({"gradient_checkpointing": True, "lora": {"rank": 4, "dropout": 0.3}}, 40),
    ],
)
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_gradcache_has_the_direct_gradient(fields: dict[str, Any], tokens: int, attention_dropout: float) -> None:
    simcse = {"attention_dropout": attention_dropout}
    model = model_of("simcse", simcse=simcse, batch={"forward_tokens": tokens}, **fields)
    prompts = model.prompts(TEXTS, "")
    torch.manual_seed(3)
    loss = backward_through(model, prompts, loss_of)
    cached = gradients(model)
    # Directly: the same packs, and so the same dropout, but all their graphs at once.
    packs = model.packs([len(prompt.ids) for prompt in prompts])
    assert len(packs) > 2
    torch.manual_seed(3)
    rows = torch.cat([model.vectors([prompts[i] for i in pack]) for pack in packs])
    direct = loss_of(rows[torch.tensor([i for pack in packs for i in pack]).argsort()])
    direct.backward()
    assert loss == pytest.approx(float(direct), rel=1e-5)
    assert distance(cached, gradients(model)) < 3e-6  # as processors sum: 1.04e-6 on Zen 5


def test_the_pack_does_not_change_the_gradient() -> None:
    computed = []
    for tokens in (10_000, 40):
        model = model_of(batch={"forward_tokens": tokens})
        backward_through(model, model.prompts(TEXTS, "Find:"), loss_of)
        computed.append(gradients(model))
    assert distance(*computed) < 1e-5


def test_vectors_in_training_are_those_that_encode_gives() -> None:
    model = model_of()
    vectors = model.vectors(model.prompts(TEXTS, "Find:"))
    assert model.encoder.encode(TEXTS, instruction="Find:") == pytest.approx(
        vectors.detach().numpy(), rel=1e-3, abs=1e-5
    )


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 100))
def test_packs_hold_everything_once_and_keep_to_the_limit(lengths: list[int], limit: int) -> None:
    model = object.__new__(TrainingModel)
    model.forward_tokens = limit
    packs = model.packs(lengths)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        sizes = [lengths[i] for i in pack]
        assert sum(sizes) <= limit or len(pack) == 1
        assert sizes == sorted(sizes, reverse=True)  # equal lengths side by side


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_full_fine_tuning_changes_float32_weights(precision: str) -> None:
    model = model_of(lora=None, precision=precision)
    assert {p.dtype for p in model.parameters.values()} == {torch.float32}
    assert set(model.parameters) == set(dict(model.decoder.named_parameters()))
    adamw = torch.optim.AdamW(model.parameters.values(), lr=1e-3)
    prompts = model.prompts(TEXTS, "")
    losses = []
    for _ in range(6):
        losses.append(backward_through(model, prompts, loss_of))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters.values())
        adamw.step()
        adamw.zero_grad()
        model.merge()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_states_of_an_inner_layer_do_not_depend_on_gradients(precision: str) -> None:
    """Without gradients, later layers had added their updates to the states in place."""
    model = model_of(lora=None, precision=precision)
    prompts = model.prompts(TEXTS, "")
    with_gradients = model.pooled(prompts, 1).detach()
    with torch.no_grad():
        alone = model.pooled(prompts, 1)
    assert float((with_gradients - model.pooled(prompts).detach()).norm() / with_gradients.norm()) > 0.2
    torch.testing.assert_close(alone, with_gradients, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradcache_takes_the_vectors_of_exits_as_the_direct_way_does(precision: str) -> None:
    computed = []
    for tokens in (30, 10_000):
        model = model_of(lora=None, precision=precision, batch={"forward_tokens": tokens, "graph_tokens": tokens})
        model.set_exit_head(1, first_numbers(model.decoder.hidden_size, model.dimensions, CPU), trained=True)
        backward_through(model, model.prompts(TEXTS, ""), lambda vectors: loss_of(vectors.chunk(2, dim=1)[1]))
        computed.append(gradients(model))
    assert distance(*computed) < (1e-5 if precision == "float32" else 0.05)


def test_a_decoder_without_a_row_in_the_table_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Encoder, "load", lambda *_, **__: SimpleNamespace(trainable_decoder=nn.Identity, checkpoint=PHI)
    )
    with pytest.raises(UnsupportedArchitecture, match=r"is a phi3, which has no row in .*; it cannot be trained"):
        TrainingModel(recipe_of(), CPU)


def test_devices_and_precisions() -> None:
    with pytest.raises(UsageError, match="device='cuda:77' is not available here"):
        choose_device("cuda:77")
    with pytest.raises(UsageError, match="device='gpu' is not available here"):
        choose_device("gpu")
    assert choose_device("cpu") == CPU
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_the_start_follows_from_the_seed() -> None:
    one, again, other = (TrainingModel(recipe_of(seed=seed), CPU).parameters for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_dropout_makes_two_views() -> None:
    model = model_of("simcse")
    prompts = model.prompts(TEXTS[:1], "")
    first, second = model.vectors(prompts * 2)
    assert 0.3 < float(F.cosine_similarity(first, second, dim=0)) < 0.9999
    model.decoder.eval()
    first, second = model.vectors(prompts * 2)
    torch.testing.assert_close(first, second)
