"""ONNX folders for ONNX Runtime, fastembed, transformers.js and TEI's CPU image: graph, config, tokenizer, prompts."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from unmask import __version__
from unmask.disk import atomic_folder
from unmask.export.capabilities import ExportedModel
from unmask.export.hub import default_prompt_name, lengths_of, prompts_of, sequence_tokens, write_prompted_tokenizer
from unmask.export.onnx_graph import build_graph
from unmask.export.onnx_weights import WeightStore
from unmask.export.onnx_writer import write_onnx
from unmask.training.model_folder import EncoderSettings, write_json, written_config

# Names that transformers.js chooses by its option `dtype`.
_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "q8": "model_quantized.onnx"}


def write_onnx_folder(folder: Path, model: ExportedModel, dtype: str) -> str:
    """Write `onnx/model.onnx` with what a caller needs beside it, one tensor in memory at a time.

    Returns:
        Path of the graph in the folder.

    Raises:
        StorageError: the folder cannot be written; nothing is left of it then.
    """
    settings = replace(
        EncoderSettings.from_checkpoint(model.checkpoint), causal=model.causal, max_length=model.max_length
    )
    builder, graph = build_graph(model, WeightStore(model.checkpoint.tensors, dtype))
    with atomic_folder(folder) as partial:
        (partial / "onnx").mkdir()
        file = partial / "onnx" / _FILES[dtype]
        write_onnx(file, builder, graph, {"dtype": dtype, "producer": f"unmask {__version__}"})
        config = written_config(model.checkpoint, settings, torch.float32)
        if lengths := lengths_of(model):
            config["matryoshka_dimensions"] = lengths
        write_json(partial / "config.json", config)
        write_prompted_tokenizer(partial, model)
        _adapt_tokenizer(partial, {token for part in sequence_tokens(model) for token in part})
        prompts = {"prompts": prompts_of(model), "default_prompt_name": default_prompt_name(model)}
        write_json(partial / "config_sentence_transformers.json", prompts)
    return f"onnx/{_FILES[dtype]}"


def _adapt_tokenizer(folder: Path, around: Collection[int]) -> None:
    """Change tokenizer.json so that fastembed and transformers.js make the ids that unmask makes.

    They do not read `split_special_tokens`, so the control tokens leave the list of added ones: what is not in the list
    is an ordinary string to them, as it is to unmask. Digits are spelled out, see `_spell_out_digits`.

    Args:
        around: ids that are added before and after a text. Their tokens stay in the vocabulary, where transformers.js
            looks their ids up; no merge leads to them.
    """
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    added, vocabulary = content["added_tokens"], content["model"]["vocab"]
    content["added_tokens"] = [token for token in added if not token["special"]]
    if isinstance(vocabulary, dict):
        vocabulary |= {token["content"]: token["id"] for token in added if token["id"] in around}
    content["pre_tokenizer"] = _spell_out_digits(content["pre_tokenizer"])
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if tokenizer.token_to_id(settings["pad_token"]) is None:
        # Masked positions may hold any id.
        settings["pad_token"] = tokenizer.id_to_token(min(tokenizer.get_vocab().values()))
        write_json(settings_file, settings)


def _spell_out_digits(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Replace each pre-tokenizer `Digits` by a split that has the same pieces in every reader.

    `Digits` splits at all numbers of Unicode in the library that models are made with, and only at 0 to 9 in
    transformers.js, which so reads "½" and "²" otherwise. A split at a pattern means the same to both.

    Args:
        step: a pre-tokenizer of tokenizer.json, or None.
    """
    if step is None:
        return None
    if step["type"] == "Sequence":
        return step | {"pretokenizers": [_spell_out_digits(inner) for inner in step["pretokenizers"]]}
    if step["type"] != "Digits":
        return step
    pattern = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
