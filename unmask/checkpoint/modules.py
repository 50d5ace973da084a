"""sentence-transformers folders and embedding GGUF files: refused unless `Encoder` reads them as their makers meant.

Their pooling, mask, prompts and further layers decide the vector, and `Encoder` reads another description
(`llm2vec_config.json`), so a folder that means anything else is refused with the name of the setting.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError

# `llama.cpp`, include/llama.h, enum llama_pooling_type.
_GGUF_POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


def read_modules(folder: Path, config: Mapping[str, Any], pools_prefix: bool) -> dict[str, Any]:
    """Settings of `Encoder` (as in `llm2vec_config.json`) for a folder whose `modules.json` is a bidirectional mean.

    Args:
        folder: may hold no `modules.json`; then there are no settings.
        config: its `config.json`.
        pools_prefix: the tokenizer puts tokens (BOS) before a text; sentence-transformers averages their states too.

    Raises:
        CheckpointError: a module, the pooling, the mask or a prompt means a vector that `Encoder` does not compute.
    """
    if not (folder / "modules.json").is_file():
        return {}
    modules = _read(folder / "modules.json")
    kinds = [(str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))) for module in modules]
    names = [kind for kind, _ in kinds]
    differences = [f"a module {name}" for name in names if name not in ("Transformer", "Pooling", "Normalize")]
    pooling = {}
    for kind, path in kinds:
        if kind == "Pooling":
            pooling = _read(folder / path / "config.json")
    if names[:2] != ["Transformer", "Pooling"]:
        differences.append("no pooling after the transformer")
    modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    mode = pooling.get("pooling_mode")
    modes += [mode] if isinstance(mode, str) else list(mode or ())
    if modes not in (["mean_tokens"], ["mean"]):
        differences.append(f"pooling {' and '.join(map(str, modes)) or 'of an unknown kind'}")
    if config.get("is_causal") is not False and config.get("use_bidirectional_attention") is not True:
        differences.append("a causal mask (config.json lacks is_causal=false and use_bidirectional_attention=true)")
    if pools_prefix:
        differences.append("a mean that includes BOS")
    settings = _read(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    # `instruction` is stripped and joined by one space.
    differences += [
        f"a prompt {name} that does not end in one space"
        for name, prompt in prompts.items()
        if prompt and prompt != f"{prompt.strip()} "
    ]
    if prompts.get(settings.get("default_prompt_name")):
        differences.append(f"a default prompt ({settings['default_prompt_name']})")
    if settings.get("truncate_dim"):
        differences.append(f"vectors cut to truncate_dim={settings['truncate_dim']}")
    lengths = _read(folder / "sentence_bert_config.json")
    if lengths.get("do_lower_case"):
        differences.append("texts in lower case (do_lower_case)")
    if differences:
        raise CheckpointError(
            f"{folder / 'modules.json'} describes {'; '.join(differences)}, which unmask does not compute yet. Use "
            "sentence-transformers for its vectors (unmask evaluate does); to encode with the decoder alone, as a "
            'bidirectional mean, write llm2vec_config.json with {"pooling_mode": "mean"} beside it'
        )
    encoder_config: dict[str, Any] = {
        "pooling_mode": "mean",
        "skip_instruction": not pooling.get("include_prompt", True),
    }
    length = lengths.get("max_seq_length")
    return {**encoder_config, "max_length": length} if length else encoder_config


def require_readable_gguf(path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
    """Check that a GGUF file is a language model, or an embedding model with a bidirectional mean.

    Raises:
        CheckpointError: the file's pooling or mask means another vector.
    """
    number = fields.get(f"{architecture}.pooling_type")
    if number is None or int(number) == 0:
        return
    kind = _GGUF_POOLINGS.get(int(number), str(number))
    if kind != "mean":
        raise CheckpointError(
            f"{path} is an embedding model with pooling_type {kind}, which unmask does not read from GGUF files; "
            "use llama.cpp, or the model's folder in the hub's layout"
        )
    if fields.get(f"{architecture}.attention.causal", True):
        raise CheckpointError(
            f"{path} is an embedding model with pooling_type mean and a causal mask "
            f"(no {architecture}.attention.causal = false), which unmask does not read from GGUF files; use llama.cpp, "
            "or the model's folder in the hub's layout"
        )


def _read(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    expected = list if file.name == "modules.json" else dict
    if not isinstance(content, expected) or not all(isinstance(item, dict) for item in content if expected is list):
        raise CheckpointError(f"{file} is not what sentence-transformers writes: expected a JSON {expected.__name__}")
    return content
