"""Tests of decoders with further layers on top."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import gradients, recipe_of, texts_of, write_decoder, write_pairs
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.tensors import EMBEDDING
from unmask.cli import build_app
from unmask.encoder import Encoder
from unmask.encoder.deepen import deepen
from unmask.encoder.model.architectures import shape_of
from unmask.errors import UsageError
from unmask.training.gradcache import backward_through
from unmask.training.model_folder import EncoderSettings, write_model_folder
from unmask.training.training_model import TrainingModel

GEMMA2 = {
    "model_type": "gemma2", "sliding_window": 4, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8,
    "head_dim": 8,
}  # fmt: skip


def write_deepened(model: Path, donor: Path, layers: list[int], folder: Path) -> Path:
    checkpoint = deepen(open_checkpoint(model), open_checkpoint(donor), layers)
    write_model_folder(
        folder, checkpoint, checkpoint.tensors, EncoderSettings.from_checkpoint(checkpoint), torch.float32
    )
    return folder


@pytest.mark.parametrize(
    "config", [{}, {"attention_bias": True, "mlp_bias": True}, GEMMA2], ids=["llama", "bias", "gemma2"]
)
def test_a_deepened_model_has_the_same_vectors_and_learns_in_its_new_layers(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = write_decoder(tmp_path / "model", num_hidden_layers=2, **config)
    donor = write_decoder(tmp_path / "donor", num_hidden_layers=4, **config)
    deeper = write_deepened(model, donor, [1, 3], tmp_path / "deeper")
    texts = texts_of(6)
    assert np.array_equal(Encoder.load(model).encode(texts), Encoder.load(deeper).encode(texts))
    tensors, of_donor = load_file(deeper / "model.safetensors"), load_file(donor / "model.safetensors")
    assert torch.equal(tensors["layers.3.mlp.up_proj.weight"], of_donor["layers.3.mlp.up_proj.weight"])
    assert torch.equal(tensors["layers.2.input_layernorm.weight"], of_donor["layers.1.input_layernorm.weight"])

    write_pairs(tmp_path, 20)
    training = TrainingModel(recipe_of(base=str(deeper), lora=None), torch.device("cpu"))
    backward_through(training, training.prompts(texts, ""), lambda vectors: vectors.square().mean())
    reached = [
        name for name, gradient in gradients(training).items() if name.startswith("layers.3.") and gradient.any()
    ]
    assert any("out" in name for name in reached)
    assert any("down" in name for name in reached)


def test_windows_and_ropes_stay_with_their_layers(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", num_hidden_layers=2, **GEMMA2)
    donor = write_decoder(tmp_path / "donor", num_hidden_layers=4, **GEMMA2)
    whole, below = (shape_of(open_checkpoint(path).config) for path in (donor, model))
    shape = shape_of(deepen(open_checkpoint(model), open_checkpoint(donor), [2, 3]).config)
    assert whole is not None and below is not None and shape is not None
    assert shape.windows == (*below.windows, *whole.windows[2:])


def test_layers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "model", num_hidden_layers=2)
    other = write_decoder(tmp_path / "other", num_hidden_layers=2, intermediate_size=40, rope_theta=5.0)
    with pytest.raises(UsageError, match="intermediate_size is 40 and "):
        deepen(open_checkpoint(model), open_checkpoint(other), [1])
    with pytest.raises(UsageError, match="has 2 layers"):
        deepen(open_checkpoint(model), open_checkpoint(model), [2])


def test_the_command_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_decoder(tmp_path / "model", num_hidden_layers=1)
    donor = write_decoder(tmp_path / "donor", num_hidden_layers=3)
    arguments = ["deepen", str(model), "--donor", str(donor), "--layers", "1-2", "-o", str(tmp_path / "deeper")]
    assert build_app()(arguments, result_action="return_value") == 0
    assert "3 layers" in capsys.readouterr().err
    texts = texts_of(3)
    assert np.array_equal(Encoder.load(model).encode(texts), Encoder.load(tmp_path / "deeper").encode(texts))


def test_a_model_goes_on_naming_the_model_with_its_token_embedding(tmp_path: Path) -> None:
    donor = write_decoder(tmp_path / "donor", num_hidden_layers=3)
    whole = write_decoder(tmp_path / "whole", num_hidden_layers=1)
    checkpoint = open_checkpoint(whole)
    settings = replace(EncoderSettings.from_checkpoint(checkpoint), embedding_from=str(whole))
    write_model_folder(tmp_path / "model", checkpoint, checkpoint.tensors, settings, torch.float32)
    arguments = ["deepen", str(tmp_path / "model"), "--donor", str(donor), "--layers", "2", "-o", str(tmp_path / "out")]
    assert build_app()(arguments, result_action="return_value") == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert EMBEDDING not in load_file(tmp_path / "out" / "model.safetensors")
    texts = texts_of(3)
    assert np.array_equal(Encoder.load(whole).encode(texts), Encoder.load(tmp_path / "out").encode(texts))


def test_a_key_that_an_older_folder_kept_does_not_take_away_its_own_embedding(tmp_path: Path) -> None:
    donor = write_decoder(tmp_path / "donor", num_hidden_layers=3)
    model = write_decoder(tmp_path / "model", num_hidden_layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "token_embedding_from": "unmask/smollm2-135m"}))
    arguments = ["deepen", str(model), "--donor", str(donor), "--layers", "2", "-o", str(tmp_path / "out")]
    assert build_app()(arguments, result_action="return_value") == 0
    texts = texts_of(3)
    assert np.array_equal(Encoder.load(model).encode(texts), Encoder.load(tmp_path / "out").encode(texts))
