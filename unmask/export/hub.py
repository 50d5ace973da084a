"""The hub folder: one that sentence-transformers, vLLM, TEI, transformers and llama.cpp's converter read right.

`training.model_folder` writes weights, config and tokenizer. This module adds the files of sentence-transformers, in
the spelling that its versions 3 to 6, TEI and vLLM all read: type names of the package `models`, pooling as one flag
per mode, and no key that an older version would refuse.

BOS is kept out of the mean by a module WordWeights, which gives its id the weight 0. The instruction is kept out by
`include_prompt: false`, and its tokens are counted right by a rule in tokenizer.json (`checkpoint.tokenizer`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unmask.checkpoint import Checkpoint
from unmask.checkpoint.head import head_names
from unmask.checkpoint.tensors import LM_HEAD, TensorSource
from unmask.checkpoint.tokenizer import prompt_rule
from unmask.encoder.head import head_steps, vector_length
from unmask.export.capabilities import ExportedModel
from unmask.training.model_folder import (
    DTYPES,
    EncoderSettings,
    NamedTensors,
    write_json,
    write_model_folder,
    write_tensors,
    write_tokenizer,
)

# Version of sentence-transformers whose files these are. Older ones warn of a newer number, newer ones do not.
_LIBRARY = {"sentence_transformers": "5.2.0", "transformers": "5.2.0"}
_POOLINGS = {
    "mean": "mean_tokens",
    "weighted_mean": "weightedmean_tokens",
    "last_token": "lasttoken",
    "eos_token": "lasttoken",
    "first_token": "cls_token",
    "bos_token": "cls_token",
}
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_ACTIVATIONS = {
    "identity": "linear.Identity",
    "tanh": "activation.Tanh",
    "relu": "activation.ReLU",
    "gelu": "activation.GELU",
    "silu": "activation.SiLU",
    "sigmoid": "activation.Sigmoid",
}


class DecoderTensors:
    """Tensors of a checkpoint without its language-model head and without the layers behind the pooling.

    No embedding runtime reads the first. The second are written as Dense modules alone: vLLM takes every safetensors
    file beside `config.json` for a part of the decoder, and refuses a folder with a `head.safetensors`.
    """

    def __init__(self, tensors: TensorSource) -> None:
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        left_out = (LM_HEAD, *head_names(self._tensors))
        return [name for name in self._tensors.names() if name not in left_out]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)


def write_hub_folder(folder: Path, model: ExportedModel, dtype: str) -> None:
    """Write the folder, one tensor in memory at a time.

    Raises:
        UsageError: the folder is not empty.
        StorageError: it cannot be written; nothing is left of it then.
    """
    tensors = DecoderTensors(model.checkpoint.tensors)
    checkpoint = replace(
        model.checkpoint,
        config={**model.checkpoint.config, **_matryoshka_config(model)},
        encoder_config=stored_settings(model),
    )
    settings = replace(EncoderSettings.from_checkpoint(checkpoint), causal=model.causal, max_length=model.max_length)

    def add_files(partial: Path) -> None:
        _add_sentence_transformers(partial, model, checkpoint)

    write_model_folder(folder, checkpoint, tensors, settings, DTYPES[dtype], add_files)


def stored_settings(model: ExportedModel) -> dict[str, Any]:
    """Settings of the exported model in `llm2vec_config.json`, by which unmask reads the folder to the same bits."""
    checkpoint = model.checkpoint
    settings = dict(checkpoint.encoder_config)
    settings["query_instruction"] = model.instructions["query"]
    settings["document_instruction"] = model.instructions["document"]
    if others := {name: text for name, text in model.instructions.items() if text}:
        settings["instructions"] = others
    tokenizer = checkpoint.tokenizer
    if sequence_tokens(model) != (tokenizer.prefix, tokenizer.suffix):
        settings["sequence_tokens"] = [list(tokenizer.prefix), list(tokenizer.suffix)]
    steps = list(head_steps(checkpoint.tensors, checkpoint.encoder_config))
    if model.dimensions is not None:
        steps.append({"kind": "truncate", "dimensions": model.dimensions})
    if steps:
        settings["head"] = steps
    return settings


def sequence_tokens(model: ExportedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the exported tokenizer adds before and after a text: those of a template too."""
    parts, tokenizer = model.parts, model.checkpoint.tokenizer.plain
    # A template's end begins with a space or a control token, where no tokenizer joins words.
    end = tokenizer.encode(parts.plain_tail, add_special_tokens=False).ids if parts.plain_tail else []
    return parts.head, (*end, *parts.tail)


def prompts_of(model: ExportedModel) -> dict[str, str]:
    """Prompts by name, as text that is put before a text: instruction, its space, and plain text of a template."""
    return {name: text if model.is_plain else model.prompts.opening(text) for name, text in model.instructions.items()}


def default_prompt_name(model: ExportedModel) -> str | None:
    """Name of the prompt of texts without one: only for models that need text before every text."""
    if not model.is_plain:
        return "document" if model.parts.plain_head else None
    default = model.checkpoint.encoder_config.get("default_instruction")
    return next((name for name, text in model.instructions.items() if default and text == default), None)


def write_prompted_tokenizer(folder: Path, model: ExportedModel) -> None:
    """Write the tokenizer with the template's special tokens and the rules that count prompts right."""
    write_tokenizer(folder, model.checkpoint, model.max_length, around=sequence_tokens(model))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rules = [prompt_rule(prompt) for prompt in dict.fromkeys(prompts_of(model).values()) if prompt.endswith(" ")]
    if rules and model.prompts.skip_instruction and model.is_mean and not model.is_plain:
        own = content["normalizer"]
        steps = [*rules, *(own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    tokenizer = model.checkpoint.tokenizer.text
    settings.setdefault("pad_token", tokenizer.id_to_token(0))
    settings["padding_side"] = "right"
    # sentence-transformers takes the token behind a prompt for a part of it unless it is one of these.
    if further := [token for token in map(tokenizer.id_to_token, model.parts.tail) if token != settings["pad_token"]]:
        settings["extra_special_tokens"] = further
    write_json(settings_file, settings)


def vector_size(model: ExportedModel) -> int:
    """Length of the vectors of an exported model."""
    checkpoint = model.checkpoint
    hidden_size = int(checkpoint.config["hidden_size"])
    length = vector_length(checkpoint.tensors, hidden_size, checkpoint.encoder_config)
    return min(length, model.dimensions or length)


def lengths_of(model: ExportedModel) -> list[int]:
    """Matryoshka lengths of a model, the longest first; the cut of the export is one of them."""
    stated = model.checkpoint.encoder_config.get("matryoshka") or model.checkpoint.config.get("matryoshka_dimensions")
    lengths = {int(length) for length in stated or ()} | ({model.dimensions} if model.dimensions else set())
    return sorted((length for length in lengths if length <= vector_size(model)), reverse=True)


def _matryoshka_config(model: ExportedModel) -> dict[str, Any]:
    return {"matryoshka_dimensions": lengths} if (lengths := lengths_of(model)) else {}


def _add_sentence_transformers(folder: Path, model: ExportedModel, checkpoint: Checkpoint) -> None:
    """Write modules.json and the files that it names."""
    write_prompted_tokenizer(folder, model)
    modules = [("Transformer", "")]
    weightless = _weightless_tokens(model)
    if weightless:
        modules.append(("WordWeights", "1_WordWeights"))
        _write_word_weights(folder / "1_WordWeights", checkpoint, weightless)
    modules.append(("Pooling", "1_Pooling"))  # TEI knows this path alone
    mode = _POOLINGS[model.pooling]
    pooling: dict[str, Any] = {"word_embedding_dimension": int(checkpoint.config["hidden_size"])}
    pooling |= {f"pooling_mode_{name}": name == mode for name in _MODES}
    skips = model.prompts.skip_instruction and model.pooling != "bos_token"
    _write_in(folder / "1_Pooling", pooling | {"include_prompt": not skips})
    steps = list(head_steps(checkpoint.tensors, model.checkpoint.encoder_config))
    cut = next((int(step["dimensions"]) for step in steps if step["kind"] == "truncate"), None)
    if not any(step["kind"] == "normalize" for step in steps[-2:]):
        steps.append({"kind": "normalize"})
    for path, kind in _write_steps(folder, steps, checkpoint.tensors):
        modules.append((kind, path))
    write_json(folder / "modules.json", [_module(i, kind, path) for i, (kind, path) in enumerate(modules)])
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.max_length, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": _LIBRARY,
            "prompts": prompts_of(model),
            "default_prompt_name": default_prompt_name(model),
            "similarity_fn_name": "cosine",
            "truncate_dim": model.dimensions or cut,
        },
    )


def _module(index: int, kind: str, path: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _write_in(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)


def _write_steps(folder: Path, steps: Sequence[Mapping[str, Any]], tensors: TensorSource) -> Iterator[tuple[str, str]]:
    """Write the steps behind the pooling as modules; yield path and kind of each."""
    layer = 0
    for number, step in enumerate((step for step in steps if step["kind"] != "truncate"), start=2):
        if step["kind"] == "normalize":
            path = f"{number}_Normalize"
            (folder / path).mkdir()
            yield path, "Normalize"
            continue
        path = f"{number}_Dense"
        weight, bias = (tensors.read(f"head.{layer}.{part}").float() for part in ("weight", "bias"))
        activation = f"torch.nn.modules.{_ACTIVATIONS[step.get('activation', 'identity')]}"
        config = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
        _write_in(folder / path, config | {"activation_function": activation})
        _write_float32(folder / path, {"linear.weight": weight, "linear.bias": bias})
        layer += 1
        yield path, "Dense"
    assert layer == len(head_names(tensors)) // 2


def _weightless_tokens(model: ExportedModel) -> tuple[int, ...]:
    """Ids before the text that are not pooled and that no prompt of sentence-transformers leaves out."""
    is_prompted = model.prompts.skip_instruction and bool(model.parts.plain_head)  # every text has a prompt before it
    if model.is_plain or model.pooling != "mean" or is_prompted:
        return ()
    return tuple(dict.fromkeys(model.parts.bos))


def _write_word_weights(folder: Path, checkpoint: Checkpoint, weightless: Sequence[int]) -> None:
    """Write a WordWeights module that gives every token the weight 1, and 0 to those ids."""
    size = int(checkpoint.config["vocab_size"])
    tokenizer = checkpoint.tokenizer.text
    names = {token: str(tokenizer.id_to_token(token)) for token in weightless}
    vocabulary = [names.get(token, "") for token in range(size)]
    _write_in(
        folder,
        {"vocab": vocabulary, "word_weights": dict.fromkeys(names.values(), 0.0), "unknown_word_weight": 1.0},
    )
    weights = torch.ones(size, 1)
    weights[list(weightless)] = 0.0
    _write_float32(folder, {"emb_layer.weight": weights})


def _write_float32(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    write_tensors(folder / "model.safetensors", NamedTensors(tensors), {name: name for name in tensors}, torch.float32)
