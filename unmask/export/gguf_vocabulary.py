"""A tokenizer as the fields of a GGUF header.

A header names the rule that splits text, `tokenizer.ggml.pre`, and llama.cpp has the code of each. The rule is found by
comparing the splits of traps with each known rule, and the written tokenizer is compared with the model's by its ids
(`export.gguf_file`): a wrong rule would be a silent mistake.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from unmask.checkpoint import Checkpoint
from unmask.checkpoint.gguf import header_fields
from unmask.checkpoint.gguf_tokenizer import rule_names
from unmask.errors import ExportError

# Splits of these differ between any two of llama.cpp's rules.
SPLIT_TRAPS = (
    "Hello, world! It's 1234567 o'clock, WE'RE late.",
    "3.14 and 12 345,678 or 0xFF; 2026-11-28T12:34:56Z",
    "  two blanks\n\n\tand lines \r\n  end  ",
    "東京 한국 Привет ÜBER ñandú e\u0301te\u0301 Ⅻ ½ ٣٤",
    "🙂🚀 ((nested)) --flags a_b-c/d\\e @x #y $z",
    "CamelCaseAndACRONYMS don't I'll you'd",
)
_PREFIX = "tokenizer.ggml."
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def vocabulary_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the header fields `tokenizer.ggml.*` of a model: of its own GGUF file, or made from its tokenizer.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    if checkpoint.tokenizer_folder is None:
        file = next(file for file in checkpoint.files if file.suffix == ".gguf")
        fields = {key: value for key, value in header_fields(file).items() if key.startswith(_PREFIX)}
    else:
        fields = _fields_of(checkpoint)
    tokenizer = checkpoint.tokenizer
    fields[f"{_PREFIX}add_bos_token"] = bool(tokenizer.prefix)
    fields[f"{_PREFIX}add_eos_token"] = bool(tokenizer.suffix)
    return fields


def add_fields(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Write header fields, each in the type that llama.cpp reads."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, np.ndarray):
            as_python = value.astype(float if value.dtype.kind == "f" else int).tolist()
            writer.add_array(key, as_python)
        else:
            writer.add_array(key, list(value))


def _fields_of(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer
    content = json.loads(tokenizer.text.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f"--to gguf: {checkpoint.name} has a tokenizer of type {model['type']}; llama.cpp's is BPE")
    size = int(checkpoint.config["vocab_size"])
    tokens = [f"[unused{row}]" for row in range(size)]
    kinds = np.full(size, int(gguf.TokenType.UNUSED))
    for token, row in model["vocab"].items():
        tokens[row], kinds[row] = token, int(gguf.TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    is_pieces = bool(model.get("byte_fallback"))
    if is_pieces:
        for row, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                kinds[row] = int(gguf.TokenType.BYTE)
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    fields: dict[str, Any] = {f"{_PREFIX}tokens": tokens, f"{_PREFIX}token_type": kinds}
    if is_pieces:
        fields |= _piece_fields(content, tokens, kinds, [merge.split(" ") for merge in merges])
    else:
        fields |= {f"{_PREFIX}model": "gpt2", f"{_PREFIX}pre": _rule(checkpoint), f"{_PREFIX}merges": merges}
    for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token is not None:
            fields[f"{_PREFIX}{name}_token_id"] = token
    return fields


def _rule(checkpoint: Checkpoint) -> str:
    names = rule_names(checkpoint.tokenizer.text, SPLIT_TRAPS)
    if not names:
        raise ExportError(
            f"--to gguf: {checkpoint.name} splits text by a rule that llama.cpp does not have under any known name; "
            "--to onnx takes the tokenizer as it is"
        )
    return names[0]


def _piece_fields(
    content: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray, merges: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Fields of a SentencePiece BPE: a score per piece in place of merges; the earlier a merge, the higher."""
    rank = {left + right: place for place, (left, right) in reversed(list(enumerate(merges)))}
    scores = np.array([-float(rank.get(token, len(merges))) for token in tokens], dtype=np.float32)
    unknown = content["model"].get("unk_token")
    if unknown in tokens:
        kinds[list(tokens).index(unknown)] = int(gguf.TokenType.UNKNOWN)
    described = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    has_space = '"Prepend"' in described or '"prepend_scheme": "first"' in described or '"always"' in described
    fields: dict[str, Any] = {f"{_PREFIX}model": "llama", f"{_PREFIX}pre": "default", f"{_PREFIX}scores": scores}
    if unknown in tokens:
        fields[f"{_PREFIX}unknown_token_id"] = list(tokens).index(unknown)
    return fields | {f"{_PREFIX}add_space_prefix": has_space}


def modelfile(name: str, max_length: int) -> str:
    """Return Ollama's Modelfile for a GGUF file beside it."""
    return f"FROM ./{Path(name).name}\nPARAMETER num_ctx {max_length}\n"
