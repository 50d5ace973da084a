"""GGUF files for llama.cpp, Ollama and LM Studio, written one tensor at a time.

llama.cpp reads the mask from `attention.causal` for every family, and pooling from `pooling_type`; without the latter
Ollama takes a file for a chat model. Gemma 3 is written as `gemma-embedding`, whose window is on both sides of a token.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from unmask.checkpoint.gguf import open_gguf
from unmask.checkpoint.gguf_families import FAMILIES, ROPE_FACTORS, GgufFamily, convert, layout_of
from unmask.disk import atomic_folder
from unmask.encoder.model.architectures import Rope, Shape
from unmask.encoder.model.decoder import Decoder
from unmask.errors import ExportError
from unmask.export.capabilities import ExportedModel, head_fits_a_layer
from unmask.export.gguf_head import exact_names, with_head_layer
from unmask.export.gguf_vocabulary import SPLIT_TRAPS, add_fields, modelfile, vocabulary_fields

_KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "q8": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "q8": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gemma3": "gemma3"}
# Names of the same decoders without the causal mask. llama-embed has no output matrix.
_BIDIRECTIONAL = {"llama": "llama-embed", "gemma3": "gemma-embedding"}
_POOLINGS = {"mean": 1, "first_token": 2, "bos_token": 2, "last_token": 3, "eos_token": 3}
_BLOCK = 32  # numbers in a block of Q8_0
_NUMBERS_AT_A_TIME = 2**22  # of a matrix in float32
_SUFFIXES = {"float32": "F32", "float16": "F16", "q8": "Q8_0"}


def write_gguf_folder(folder: Path, model: ExportedModel, dtype: str) -> str:
    """Write `NAME-F32.gguf` and Ollama's Modelfile into a new folder; return the name of the file.

    Raises:
        ExportError: llama.cpp has no tokenizer that gives the model's ids.
        StorageError: the file cannot be written; nothing is left of it then.
    """
    name = f"{folder.name}-{_SUFFIXES[dtype]}.gguf"
    if head_fits_a_layer(model):
        model = with_head_layer(model)
    fields = _header(model, dtype)
    with atomic_folder(folder) as partial:
        _write(partial / name, model, fields, dtype)
        _require_same_ids(partial / name, model)
        (partial / "Modelfile").write_text(modelfile(name, model.max_length), encoding="utf-8")
    return name


def architecture_of(model: ExportedModel) -> str:
    """Name of the model's family in a GGUF file."""
    family = str(model.checkpoint.config["model_type"])
    name = _ARCHITECTURES.get(family, family)
    return name if model.causal else _BIDIRECTIONAL.get(name, name)


def _header(model: ExportedModel, dtype: str) -> dict[str, Any]:
    """Fields of the header, by key."""
    shape, config = model.shape, model.checkpoint.config
    assert shape is not None  # the verdict has refused other models
    full, local = _ropes(shape)
    own: dict[str, Any] = {
        "block_count": shape.layers,
        "context_length": model.max_length,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(shape.eps),
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": float(full.theta),
        "vocab_size": shape.vocabulary,
        "attention.causal": model.causal,
        "pooling_type": _POOLINGS[model.pooling],
    }
    if full.kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full.factor)}
    if (window := next((w for w in shape.windows if w is not None), None)) is not None:
        one_sided = model.causal or architecture_of(model) != "gemma-embedding"
        own["attention.sliding_window"] = window if one_sided else 2 * window
        own["rope.freq_base_swa"] = float(local.theta)
        if (every := _pattern(shape)) is not None:
            own["attention.sliding_window_pattern"] = every
    if shape.softcap is not None:
        own["attn_logit_softcapping"] = shape.softcap
    if config.get("final_logit_softcapping"):
        own["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    architecture = architecture_of(model)
    general = {"general.name": model.checkpoint.name, "general.file_type": int(_FILE_TYPES[dtype])}
    return (
        general | {f"{architecture}.{key}": value for key, value in own.items()} | vocabulary_fields(model.checkpoint)
    )


def _ropes(shape: Shape) -> tuple[Rope, Rope]:
    """RoPE of the layers that attend to everything, and of those with a window."""
    full = next((rope for rope, window in zip(shape.ropes, shape.windows, strict=True) if window is None), None)
    local = next((rope for rope, window in zip(shape.ropes, shape.windows, strict=True) if window is not None), None)
    return full or shape.ropes[0], local or shape.ropes[0]


def _pattern(shape: Shape) -> int | None:
    """Number k if every k-th layer attends to everything and the others within the window; None for no such number."""
    is_full = [window is None for window in shape.windows]
    for every in range(2, shape.layers + 2):
        if is_full == [(layer + 1) % every == 0 for layer in range(shape.layers)]:
            return every
    return None


def _write(file: Path, model: ExportedModel, fields: Mapping[str, Any], dtype: str) -> None:
    architecture = architecture_of(model)
    writer = gguf.GGUFWriter(file, architecture)
    try:
        add_fields(writer, fields)
        names = list(_tensors(model, FAMILIES[architecture]))
        for name, hub_name, shape in names:
            kind = _kind(model, hub_name, shape, dtype)
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), int(np.prod(shape)) // elements * size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, hub_name, shape in names:
            kind = _kind(model, hub_name, shape, dtype)
            writer.write_tensor_data(_stored(_read(model, FAMILIES[architecture], hub_name), kind))
    finally:
        writer.close()


def _tensors(model: ExportedModel, family: GgufFamily) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name in the file, the hub's name, and shape of every tensor of the decoder."""
    shape, tensors = model.shape, model.checkpoint.tensors
    assert shape is not None
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
    }
    in_file = {hub: name for name, (hub, _) in layout_of(family, sizes, shape.vocabulary).items()}
    with torch.device("meta"):
        needed = [name for names in Decoder(shape).sources().values() for name in names]
    if _factors(shape) is not None:
        yield ROPE_FACTORS, ROPE_FACTORS, (shape.head_dim // 2,)
    for hub in needed:
        yield in_file[hub], hub, tensors.shape(hub)


def _factors(shape: Shape) -> np.ndarray | None:
    """Divisors of the rotary frequencies, where no field of the header says them; float32 [head_dim / 2]."""
    rope = _ropes(shape)[0]
    if not rope.factors and rope.kind != "llama3":
        return None
    plain = Rope(rope.theta).frequencies(shape.head_dim)
    return (plain / rope.frequencies(shape.head_dim)).numpy()


def _kind(model: ExportedModel, name: str, shape: tuple[int, ...], dtype: str) -> gguf.GGMLQuantizationType:
    """Type of a tensor. In 8 bits the first tenth of the layers stays in 16: rounding there is worth most."""
    if len(shape) < 2 or dtype == "float32" or name in exact_names(model):
        return gguf.GGMLQuantizationType.F32
    assert model.shape is not None
    exact_layers = -(-model.shape.layers // 10)
    early = name.startswith("layers.") and int(name.split(".")[1]) < exact_layers
    if dtype == "q8" and (early or shape[-1] % _BLOCK):
        return gguf.GGMLQuantizationType.F16
    return _KINDS[dtype]


def _read(model: ExportedModel, family: GgufFamily, name: str) -> torch.Tensor:
    """Read a tensor in GGUF's layout; a matrix keeps its stored precision, in which no number of it is changed."""
    shape = model.shape
    assert shape is not None
    if name == ROPE_FACTORS:
        factors = _factors(shape)
        assert factors is not None
        return torch.from_numpy(factors)
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    tensor = model.checkpoint.tensors.read(name)
    return convert(family, heads, name, tensor if tensor.ndim > 1 else tensor.float())


def _stored(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Convert a tensor to a type of GGUF, some rows at a time: the whole in float32 may be most of the memory."""
    if tensor.ndim < 2:
        return quantize(tensor.float().contiguous().numpy(), kind)
    out: np.ndarray | None = None
    rows = max(1, _NUMBERS_AT_A_TIME // tensor.shape[1])
    for start in range(0, len(tensor), rows):
        part = quantize(tensor[start : start + rows].float().contiguous().numpy(), kind)
        if out is None:
            out = np.empty((len(tensor), *part.shape[1:]), dtype=part.dtype)
        out[start : start + rows] = part
    assert out is not None
    return out


def _require_same_ids(file: Path, model: ExportedModel) -> None:
    """Compare the ids of the tokenizer that was written with the model's own.

    Raises:
        ExportError: they differ for a text.
    """
    tokenizer = open_gguf(file)[2]
    own = model.checkpoint.tokenizer
    for text in (*SPLIT_TRAPS, *filter(None, model.instructions.values())):
        ids = [t.plain.encode(text, add_special_tokens=False).ids for t in (tokenizer, own)]
        if ids[0] != ids[1]:
            raise ExportError(
                f"--to gguf: a GGUF file has no tokenizer that gives the ids of {model.checkpoint.name}: {text!r:.60} "
                f"gives {ids[0][:8]} and not {ids[1][:8]}; --to onnx takes the tokenizer as it is"
            )
    if (tokenizer.prefix, tokenizer.suffix) != (own.prefix, own.suffix):
        raise ExportError(
            f"--to gguf: {model.checkpoint.name} adds {own.prefix} and {own.suffix} around a text; a GGUF file can say "
            "BOS and EOS alone"
        )
