"""Tests of decoders with only some of their layers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny import CPU, GOLDEN, texts_of, write_decoder
from unmask.checkpoint import open_checkpoint
from unmask.encoder import Encoder
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.shear import parse_layers, shear
from unmask.errors import UsageError
from unmask.training.model_folder import EncoderSettings, write_model_folder


def write_sheared(base: Path, layers: int | list[int], folder: Path) -> Path:
    checkpoint = shear(open_checkpoint(base), layers)
    write_model_folder(
        folder, checkpoint, checkpoint.tensors, EncoderSettings.from_checkpoint(checkpoint), torch.float32
    )
    return folder


def test_layers_as_written_on_a_command_line() -> None:
    assert parse_layers("8") == 8
    assert parse_layers("0-3") == [0, 1, 2, 3]
    assert parse_layers("0,2, 4-5") == [0, 2, 4, 5]
    for text in ("", "a", "3-", "-1", "1;2"):
        with pytest.raises(UsageError, match="write a count"):
            parse_layers(text)


@pytest.mark.parametrize("layers", [1, 2, [0, 2], [1, 2]])
def test_a_sheared_decoder_computes_the_layers_that_are_left(layers: int | list[int], tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", num_hidden_layers=3)
    encoder = Encoder.load(base, layers=layers)
    whole = Encoder.load(base).trainable_decoder()
    assert isinstance(whole, Decoder)
    layers_left = range(layers) if isinstance(layers, int) else layers
    whole.layers = torch.nn.ModuleList(whole.layers[i] for i in layers_left)
    whole.shape = encoder._decoder.shape  # pyright: ignore[reportAttributeAccessIssue]
    ids = torch.tensor([5, 9, 3, 7], device=CPU)
    with torch.inference_mode():
        assert torch.allclose(whole(ids, [4]), encoder._decoder(ids, [4]), atol=1e-6)


def test_a_written_folder_has_the_same_vectors_and_another_revision(tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", num_hidden_layers=3)
    texts = texts_of(5)
    loaded, written = Encoder.load(base, layers=2), Encoder.load(write_sheared(base, 2, tmp_path / "two"))
    assert np.array_equal(loaded.encode(texts), written.encode(texts))
    assert loaded.checkpoint.revision != Encoder.load(base).checkpoint.revision
    assert loaded.checkpoint.revision != Encoder.load(base, layers=1).checkpoint.revision
    assert written.checkpoint.config["num_hidden_layers"] == 2


def test_windows_stay_with_their_layers(tmp_path: Path) -> None:
    base = write_decoder(
        tmp_path / "base", model_type="gemma2", num_hidden_layers=4, sliding_window=4, hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=8, head_dim=8,
    )  # fmt: skip
    whole = shape_of(open_checkpoint(base).config)
    assert whole is not None
    for layers in (2, [0, 1, 2], [1, 2], [0, 2], [3]):
        shape = shape_of(shear(open_checkpoint(base), layers).config)
        layers_left = range(layers) if isinstance(layers, int) else layers
        assert shape is not None
        assert shape.windows == tuple(whole.windows[i] for i in layers_left)


@pytest.mark.parametrize("layers", [0, 4, [], [0, 0], [2, 1], [3], [-1]])
def test_layers_that_are_not_there_are_refused(layers: int | list[int], tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(UsageError, match="has 3 layers"):
        shear(open_checkpoint(base), layers)


def test_all_layers_are_the_decoder_itself() -> None:
    checkpoint = open_checkpoint(GOLDEN / "tiny_llama")
    assert shear(checkpoint, int(checkpoint.config["num_hidden_layers"])) is checkpoint
