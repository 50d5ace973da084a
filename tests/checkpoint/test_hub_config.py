"""Configurations that leave out what the config class of their family adds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.layouts import gemma
from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.hub_config import CLASS_NUMBERS, with_class_numbers
from unmask.encoder.model.architectures import ARCHITECTURES, shape_of
from unmask.errors import CheckpointError


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_numbers_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family).to_dict()
    numbers = {key: theirs.get(key) for key in CLASS_NUMBERS[family]}
    assert numbers == CLASS_NUMBERS[family]
    # One that is not in the table has a default of its own in the reader, or means none.
    rest = {"num_key_value_heads": theirs["num_attention_heads"], "sliding_window": None}
    assert all(theirs.get(key) == value for key, value in rest.items() if key not in CLASS_NUMBERS[family])


def test_a_multimodal_gemma_is_read_as_transformers_does(tmp_path: Path) -> None:
    """Layout of google/gemma-3-4b-it: heads, key-value heads and vocabulary are not in its config.json."""
    from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 16,
    }
    tokenizer, settings = gemma()
    torch.manual_seed(0)
    model = Gemma3TextModel(Gemma3TextConfig(**text, vocab_size=tokenizer.get_vocab_size())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    encoder = Encoder.load(tmp_path, causal=True, max_length=64)
    prompt = encoder.prompts.build(["the river runs under the old bridge"])[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(prompt.ids)[None]).last_hidden_state[0]
    np.testing.assert_allclose(encoder.states([prompt.ids]), expected, atol=1e-4)
    config = open_checkpoint(tmp_path).config
    assert config["vocab_size"] == tokenizer.get_vocab_size() and config["max_position_embeddings"] == 131072


def test_a_missing_number_of_key_value_heads_is_that_of_the_class() -> None:
    def groups(**values: Any) -> int:
        config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 9, **values}
        shape = shape_of(with_class_numbers(config, is_part=False))
        assert shape is not None
        return shape.kv_heads

    assert groups(model_type="gemma3_text", num_attention_heads=8) == 4
    assert groups(model_type="mistral", num_attention_heads=32) == 8
    assert groups(model_type="mistral", num_attention_heads=32, num_key_value_heads=None) == 32
    assert groups(model_type="mistral", num_attention_heads=4) == 4  # no weights have eight of four
    assert groups(model_type="llama", num_attention_heads=4) == 4


def test_a_missing_window_is_that_of_the_class() -> None:
    config = {"model_type": "mistral", "num_hidden_layers": 1}
    assert with_class_numbers(config, is_part=False)["sliding_window"] == 4096
    assert with_class_numbers({**config, "sliding_window": None}, is_part=False)["sliding_window"] is None


def test_a_decoder_alone_states_its_sizes(copied) -> None:
    folder = copied("tiny_llama")
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads is None"):
        Encoder.load(folder)
