"""Tests of probing the layers of a decoder."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny import CPU, recipe_of, texts_of, write_decoder, write_pairs
from unmask.cli import build_app
from unmask.encoder import Encoder
from unmask.encoder.model.decoder import Decoder
from unmask.errors import UsageError
from unmask.training.layer_probe import probe_layers, probe_recipe
from unmask.training.training_model import TrainingModel

TEXTS = texts_of(80)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    write_decoder(tmp_path / "base", num_hidden_layers=3)
    return write_pairs(tmp_path, 60)


def test_states_by_layer_are_those_of_sheared_decoders(folder: Path) -> None:
    decoder = Encoder.load(folder / "base").trainable_decoder()
    assert isinstance(decoder, Decoder)
    ids, lengths = torch.tensor([5, 9, 3, 7, 11]), [3, 2]
    with torch.inference_mode():
        states = list(decoder.states_by_layer(ids, lengths))
        assert len(states) == 4
        for layers in (1, 2, 3):
            cut = Encoder.load(folder / "base", layers=layers).trainable_decoder()
            assert torch.allclose(cut(ids, lengths), states[layers], atol=1e-6)


def test_targets_made_of_one_layer_are_read_best_there(folder: Path) -> None:
    model = TrainingModel(recipe_of(base=str(folder / "base"), lora=None), CPU)
    second = Encoder.load(folder / "base", layers=2).encode(TEXTS, normalize=True)
    scores = probe_layers(model, TEXTS, second, held_out=30, penalty=1.0)
    assert [score.layer for score in scores] == [0, 1, 2, 3]
    assert max(scores, key=lambda score: score.cosine).layer == 2
    with pytest.raises(UsageError, match="30 texts, 30 of them held out"):
        probe_layers(model, TEXTS[:30], second[:30], held_out=30)


def test_a_recipe_is_probed_and_drawn(folder: Path) -> None:
    rows = [f"{first}\t{second}\t{i % 5}" for i, (first, second) in enumerate(pairwise(TEXTS))]
    pairs = "\n".join(["first\tsecond\tscore", *rows]) + "\n"
    (folder / "dev.tsv").write_text(pairs, encoding="utf-8")
    recipe = recipe_of(
        base=str(folder / "base"),
        distillation={"teachers": [{"model": str(folder / "base")}], "dimensions": 16},
        dev=[{"name": "dev", "path": "dev.tsv", "first": "first", "second": "second", "score": "score"}],
    )
    curves = probe_recipe(recipe, folder, folder / "probe", texts=50, held_out=20, causal=True)
    assert list(curves) == ["mask off", "causal"]
    assert all(-100 <= score.graded["dev"] <= 100 for score in curves["mask off"])
    stored = json.loads((folder / "probe" / "probe.json").read_text())
    assert np.isclose(stored["causal"][1]["cosine"], curves["causal"][1].cosine)
    assert (folder / "probe" / "probe.svg").stat().st_size > 5000
    assert (folder / "probe" / "probe.png").stat().st_size > 5000


def test_the_command_needs_a_teacher(folder: Path) -> None:
    (folder / "recipe.toml").write_text(
        f'base = "{folder / "base"}"\nobjective = "supervised"\nsteps = 1\n'
        '[[data]]\nname = "pairs"\npath = "pairs.tsv"\nquery = "query"\npositive = "positive"\n',
        encoding="utf-8",
    )
    with pytest.raises(UsageError, match=r"has no \[distillation\]"):
        build_app("*")(
            ["probe-layers", str(folder / "recipe.toml"), "--output", str(folder / "out")],
            exit_on_error=False,
            result_action="return_value",
        )
