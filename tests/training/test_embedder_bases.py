"""Embedding models of other makers as the base of a run: trained, written, merged and loaded as they were made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.tiny import recipe_of
from unmask import Encoder
from unmask.errors import UsageError
from unmask.training.merging import merge_adapters
from unmask.training.train import run_training

GEMMA, QWEN = "google/embeddinggemma-300m", "Qwen/Qwen3-Embedding-0.6B"
TEXTS = ["river", "  The moon walks slowly over the green table.", "many words under the bridge " * 40]

Published = Callable[[str], Path]


def same_kind(model: Encoder, base: Encoder) -> None:
    assert (model.pooling, model.causal, model.dim) == (base.pooling, base.causal, base.dim)
    for ours, theirs in ((model.encode_query, base.encode_query), (model.encode_document, base.encode_document)):
        moved = np.abs(ours(TEXTS) - theirs(TEXTS)).max()
        assert 1e-5 < moved < 0.5  # trained, and otherwise the same model
        assert np.allclose(np.linalg.norm(ours(TEXTS), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", [GEMMA, QWEN])
@pytest.mark.parametrize("lora", [True, False])
def test_a_run_keeps_what_its_base_is(name: str, lora: bool, published: Published, data: Path, tmp_path: Path) -> None:
    base = published(name)
    changes: dict[str, Any] = {} if lora else {"lora": None}
    recipe = recipe_of(base=str(base), steps=2, optimiser={"lr": 1e-4}, matryoshka=[16], **changes)
    assert recipe.pooling is None and recipe.causal is None
    result = run_training(recipe, data=data, output=tmp_path / "run")
    trained, before = Encoder.load(result.folder), Encoder.load(base)
    same_kind(trained, before)
    if lora:
        assert trained.max_length == before.max_length
        merge_adapters(str(result.folder), [], tmp_path / "merged", "float32")
        merged = Encoder.load(tmp_path / "merged")
        assert np.abs(merged.encode_query(TEXTS) - trained.encode_query(TEXTS)).max() <= 1e-5
        assert merged.causal == before.causal


def test_the_mask_can_be_removed(published: Published, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base=str(published(QWEN)), steps=1, causal=False, pooling="mean")
    trained = Encoder.load(run_training(recipe, data=data, output=tmp_path / "run").folder)
    assert not trained.causal and trained.pooling == "mean"


def test_a_head_replaces_scaling_and_no_layers(published: Published, data: Path, tmp_path: Path) -> None:
    head = {"dimensions": 8}
    recipe = recipe_of(base=str(published(QWEN)), steps=1, head=head)
    trained = Encoder.load(run_training(recipe, data=data, output=tmp_path / "run").folder)
    assert trained.dim == 8 and trained.head is not None and trained.head.linear is not None
    with pytest.raises(UsageError, match=r"\[head\].* has 3 steps"):
        run_training(recipe_of(base=str(published(GEMMA)), head=head), data=data, output=tmp_path / "refused")
