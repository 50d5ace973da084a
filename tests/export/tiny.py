"""Tiny random models of every family in the hub's layout, without BOS: the mean of all tokens, in both directions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.checkpoint.layouts import MEAN, Layout, byte_level, write_layout

WINDOW = 20
# Golden models, with BOS and without, with and without a template.
GOLDEN = ["tiny_gemma", "tiny_llama", "tiny_llama2_chat", "tiny_llama3_instruct", "tiny_mistral_instruct"]
# Texts for tests that need no more: the shipped ones take seconds.
FEW = [
    "an ordinary text",
    "x",
    "7 lamps light the pier",
    "\tan indented line",
    "\nbegins with a line break",
    "東京 été 🙂",
    "</s> and <|im_end|> typed by a user",
    "a longer text, with 12 numbers and a name, Ada; " * 5,
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3 rope": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 256},
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
    },
}


def tokenizer_without_bos() -> tuple[Any, dict[str, Any]]:
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    return byte_level([end]), settings


def tokenizer_with_digits(individual: bool) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of SmolLM2's kind, which splits at numbers by a step of its own.

    Its vocabulary has joined what that step separates, so ids differ where the step is read otherwise.
    """
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pieces
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pieces.alphabet(), special_tokens=[end], show_progress=False
    )
    tokenizer.train_from_iterator([" ½ ½½ ²² ³ ①② ⅣⅤ ٣٤ 12 345"] * 9, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), pieces])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}


def tiny_model(
    folder: Path,
    family: str,
    tokenizer: Callable[[], tuple[Any, dict[str, Any]]] = tokenizer_without_bos,
    **settings: Any,
) -> Path:
    """Write a model that pools the mean.

    Args:
        tokenizer: makes its tokenizer and the settings of that.
        settings: further ones of its llm2vec_config.json.
    """
    layout = Layout(FAMILIES[family], tokenizer, MEAN, {})
    write_layout(folder, layout)
    for file in folder.glob("*sentence*"):
        file.unlink()
    (folder / "modules.json").unlink()
    stated = {"pooling_mode": "mean", "max_length": 96} | settings
    (folder / "llm2vec_config.json").write_text(json.dumps(stated))
    return folder
