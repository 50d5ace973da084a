"""Read GGUF files: parse the header, dequantise block formats to floats, rename tensors and fields to the hub's names.

A file is `magic, version, counts | fields | tensor infos | padding | tensor data`, little-endian throughout
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The `gguf` package reads it too, but builds an
array per string, which takes seconds for a large vocabulary; only its block formats are used here.

llama.cpp's converter changes some weights. Reading a tensor undoes that:
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.checkpoint.gguf_families import FAMILIES, GEMMA2_CAPS, ROPE_FACTORS, layout_of, undo_conversion
from unmask.checkpoint.gguf_tokenizer import build_tokenizer
from unmask.checkpoint.modules import gguf_settings
from unmask.checkpoint.tensors import EMBEDDING, LM_HEAD, TensorSource
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.errors import CheckpointError, UnsupportedArchitecture

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SMALLEST_FIELD = 8 + 4 + 1  # bytes: an empty key, its type, a small value
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes: an empty name, no dimension, its type, its offset

_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_NUMBERS = {
    kind: struct.Struct("<" + code)
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_COUNT, _KIND = _NUMBERS[10], _NUMBERS[4]

# Tensor types that hold plain numbers; every other type is made of blocks.
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# Elements dequantised at once: few enough for the intermediate arrays of a chunk to stay in the CPU's cache.
_CHUNK = 1 << 17


# Field, after the architecture's name and a dot -> entry of config.json. Later rows override earlier ones.
_NEEDED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_REAL = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", *GEMMA2_CAPS)
_ROPE_SCALING = {
    "linear": {"rope.scale_linear": "factor", "rope.scaling.factor": "factor"},
    "yarn": {
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    },
}

# Rotary tables that the config already gives, and the vision tower and projector of a multimodal file.
_IRRELEVANT = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|(?:v|mm)\..+", re.ASCII)


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorSource, TextTokenizer, dict[str, Any]]:
    """Open a `.gguf` file: configuration with the keys of the hub's config.json, weights, tokenizer, encoder settings.

    The settings have the keys of `llm2vec_config.json`; a language model has none.

    One key is not the hub's: `rope_factors` (head_dim / 2 floats) divides the rotary frequencies where the file
    says so; Llama 3.1 and later are stored that way.

    Raises:
        UnsupportedArchitecture: the file is sound, but holds a model that no code here can run.
        CheckpointError: the file is damaged, truncated or no GGUF.
    """
    header = _read_header(path)
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UnsupportedArchitecture(f"{path} holds architecture {architecture!r}; known are {supported}")
    settings = gguf_settings(path, architecture, header.fields)
    config = _config(header, architecture)
    tensors = GgufTensors(header, architecture, config)
    config["vocab_size"] = tensors.shape(EMBEDDING)[0]
    config["tie_word_embeddings"] = LM_HEAD not in tensors.names()
    config["attention_bias"] = "layers.0.self_attn.q_proj.bias" in tensors.names()
    config["mlp_bias"] = "layers.0.mlp.up_proj.bias" in tensors.names()
    tokenizer = build_tokenizer(path, header.fields)
    config["bos_token_id"], config["eos_token_id"] = tokenizer.bos_id, tokenizer.eos_id
    return config, tensors, tokenizer, settings


def tensor_types(path: Path) -> set[str]:
    """Names of the types of a file's matrices, such as F16 and Q8_0.

    Raises:
        CheckpointError: the file is damaged.
    """
    from gguf.constants import GGMLQuantizationType

    stored = _read_header(path).tensors.values()
    return {GGMLQuantizationType(tensor.kind).name for tensor in stored if len(tensor.shape) > 1}


def header_fields(path: Path) -> Mapping[str, Any]:
    """Fields of a file's header by key: numbers, texts, lists of texts and numpy arrays.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _read_header(path).fields


@dataclass(frozen=True)
class _Stored:
    """Entry of a tensor in the file: `shape` with the outermost dimension first, `start` and `size` in bytes."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class _Header:
    path: Path
    data: mmap.mmap
    fields: Mapping[str, Any]
    tensors: Mapping[str, _Stored]


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}; fetch or convert it again")


class _Cursor:
    """Reader of a header, front to back. A read past the end raises an error that says that the file is truncated."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> int:
        """Move past `size` bytes; returns where they start."""
        if size > self.left:
            raise _damaged(self.path, f"cut short, the header goes on past its end at byte {len(self.data)}")
        self.at += size
        return self.at - size

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def count(self, what: str, smallest: int) -> int:
        """Read a number of entries. Each entry takes at least `smallest` bytes, so a damaged number is noticed."""
        count = self.number(_COUNT)
        if count * smallest > self.left:
            raise _damaged(self.path, f"it announces {count} {what}, which {self.left} bytes cannot hold")
        return count

    def strings(self, count: int) -> list[str]:
        # Inlined rather than `count` calls of `string`: vocabularies and merges are half a million strings.
        data, at, size = self.data, self.at, len(self.data)
        strings, start = [], at
        try:
            for _ in range(count):
                start = at + 8
                at = start + int.from_bytes(data[at:start], "little")
                if at > size:
                    self.take(at - self.at)
                strings.append(data[start:at].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"the text at byte {start} is not UTF-8 ({error.reason})") from error
        self.at = at
        return strings

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self, key: str) -> Any:
        """Read a number, a text, a list of texts or a numpy array."""
        kind = self.number(_KIND)
        if kind == _STRING:
            return self.string()
        if kind == _FLOAT32:
            # The shortest decimal that is stored as these four bytes: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.number(_NUMBERS[kind]))))
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _ARRAY:
            return self._array(key, self.number(_KIND))
        raise _damaged(self.path, f"field {key!r} has the unknown type {kind}")

    def _array(self, key: str, kind: int) -> list[str] | np.ndarray:
        if kind == _STRING:
            return self.strings(self.count(f"texts in {key!r}", 8))
        if kind not in _NUMBERS:
            raise _damaged(self.path, f"the list {key!r} has the unknown type {kind}")
        layout = _NUMBERS[kind]
        count = self.count(f"numbers in {key!r}", layout.size)
        start = self.take(count * layout.size)
        return np.frombuffer(self.data, np.dtype(layout.format), count, start).copy()


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        if not file.read(1):
            raise _damaged(path, "it is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    if data[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {data[: len(_MAGIC)]!r}, not {_MAGIC!r}")
    cursor.take(len(_MAGIC))
    version = cursor.number(_KIND)
    if version not in _VERSIONS:
        readable = "little-endian versions " + " and ".join(map(str, _VERSIONS))
        raise CheckpointError(f"{path} is GGUF version {version:#x}; {readable} can be read")
    tensor_count = cursor.count("tensors", _SMALLEST_TENSOR)
    fields: dict[str, Any] = {}
    for _ in range(cursor.count("fields", _SMALLEST_FIELD)):
        key = cursor.string()
        if key in fields:
            raise _damaged(path, f"field {key!r} is there twice")
        fields[key] = cursor.value(key)
    return _Header(path, data, fields, _read_tensors(cursor, tensor_count, fields.get("general.alignment", 32)))


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, _Stored]:
    path = cursor.path
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}, not a power of two")
    tensors: dict[str, _Stored] = {}
    for _ in range(count):
        name = cursor.string()
        dimensions = cursor.number(_KIND)
        if not 1 <= dimensions <= 4:
            raise _damaged(path, f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number(_COUNT) for _ in range(dimensions))[::-1]
        kind, start = cursor.number(_KIND), cursor.number(_COUNT)
        if name in tensors:
            raise _damaged(path, f"tensor {name!r} is there twice")
        block = _block(kind)
        if block is None:
            raise CheckpointError(f"{path}: tensor {name!r} has type {kind}, which the installed gguf cannot decode")
        elements, size = block
        if 0 in shape or shape[-1] % elements:
            raise _damaged(path, f"tensor {name!r} of shape {shape} is not made of blocks of {elements}")
        tensors[name] = _Stored(kind, shape, start, math.prod(shape) // elements * size)
    beginning = -(-cursor.at // alignment) * alignment
    for name, stored in tensors.items():
        end = beginning + stored.start + stored.size
        if end > len(cursor.data):
            raise _damaged(path, f"cut short, tensor {name!r} ends at byte {end} of {len(cursor.data)}")
        tensors[name] = _Stored(stored.kind, stored.shape, beginning + stored.start, stored.size)
    return tensors


@cache
def _block(kind: int) -> tuple[int, int] | None:
    """Return the elements and bytes of a block of a tensor type; None if the type cannot be dequantised."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if kind not in _PLAIN:
            # Integers and the formats of intermediate results cannot be dequantised. Trying one block shows it.
            dequantize(np.zeros(size, np.uint8), GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        return None
    return elements, size


def _config(header: _Header, architecture: str) -> dict[str, Any]:
    family = FAMILIES[architecture]
    config = dict(family.constants)
    for suffix, entry in (_NEEDED | _OPTIONAL).items():
        value = _number(header, f"{architecture}.{suffix}", real=entry in _REAL, needed=suffix in _NEEDED)
        if value is not None:
            config[entry] = value
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    rotated = header.fields.get(f"{architecture}.rope.dimension_count") or config["head_dim"]
    if rotated != config["head_dim"] or config["head_dim"] % 2:
        raise UnsupportedArchitecture(
            f"{header.path} rotates {rotated} of {config['head_dim']} dimensions of a head; "
            "only an even number of all of them can be run"
        )
    if layers * len(family.block) > len(header.tensors):
        raise _damaged(header.path, f"its {len(header.tensors)} tensors cannot be {layers} layers")
    if every := config.get("sliding_window_pattern"):
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[bool((layer + 1) % every)] for layer in range(layers)]
    if family.wide_depth is not None:
        wide = layers == family.wide_depth
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if wide else config["head_dim"]
    config["rope_scaling"] = _rope_scaling(header, architecture)
    return config


def _number(header: _Header, key: str, *, real: bool, needed: bool = False) -> Any:
    """Return a positive number; None if an optional one is absent, or 0, which means "not used"."""
    value = header.fields.get(key)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()  # one number per layer, all the same
    if not needed and (value is None or value == 0):
        return None
    if value is None:
        raise _damaged(header.path, f"it does not say its {key}")
    if isinstance(value, np.ndarray) and value.size:
        raise UnsupportedArchitecture(f"{header.path} has a {key} for each layer, which cannot be run")
    allowed = (int, float) if real else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
        raise _damaged(header.path, f"its {key} is {value!r}")
    return value


def _rope_scaling(header: _Header, architecture: str) -> dict[str, Any] | None:
    # llama.cpp takes a factor without a type as linear.
    kind = header.fields.get(f"{architecture}.rope.scaling.type", "linear")
    if kind == "none":
        return None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        supported = ", ".join(_ROPE_SCALING)
        raise UnsupportedArchitecture(f"{header.path} stretches its positions by {kind!r}; known are {supported}")
    scaling: dict[str, Any] = {"rope_type": kind}
    for suffix, entry in _ROPE_SCALING[kind].items():
        value = _number(header, f"{architecture}.{suffix}", real=True)
        if value is not None:
            scaling[entry] = value
    return scaling if scaling.get("factor", 1.0) != 1.0 else None


class GgufTensors:
    """Tensors of a file under the hub's names. Reading dequantises blocks to float32; other tensors keep their type."""

    def __init__(self, header: _Header, architecture: str, config: dict[str, Any]) -> None:
        """Match every tensor with its hub name and expected shape. Adds `rope_factors` to `config`.

        Raises:
            UnsupportedArchitecture: there is a tensor that this architecture does not have.
            CheckpointError: a tensor is missing or has another shape than the header implies.
        """
        self._header, self._family, self._config = header, FAMILIES[architecture], config
        self._stored: dict[str, _Stored] = {}
        embedding = header.tensors.get("token_embd.weight")
        layout = layout_of(self._family, config, embedding.shape[0] if embedding else 0)
        for name, stored in header.tensors.items():
            if _IRRELEVANT.fullmatch(name):
                continue
            if name not in layout:
                raise UnsupportedArchitecture(
                    f"{header.path} holds a tensor {name!r}, which a plain {architecture} decoder has not"
                )
            hub_name, shape = layout[name]
            if stored.shape != shape:
                raise _damaged(header.path, f"tensor {name!r} has shape {stored.shape}, not {shape}")
            self._stored[hub_name] = stored
        missing = [name for name in layout if name.endswith(".weight") and name not in header.tensors]
        if missing := [name for name in missing if name not in ("output.weight", ROPE_FACTORS)]:
            raise _damaged(header.path, f"it lacks {len(missing)} tensors, {missing[0]} among them")
        if (factors := self._stored.pop(ROPE_FACTORS, None)) is not None:
            config["rope_factors"] = self._load(factors).tolist()

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def read(self, name: str) -> torch.Tensor:
        tensor = self._load(self._stored[name])
        if hasattr(mmap, "MADV_DONTNEED"):
            # Without this, every page that was ever read counts as memory of this process.
            self._header.data.madvise(mmap.MADV_DONTNEED)
        return undo_conversion(self._family, self._config, name, tensor)

    def _load(self, stored: _Stored) -> torch.Tensor:
        raw = np.frombuffer(self._header.data, np.uint8, stored.size, stored.start)
        if stored.kind in _PLAIN:
            return torch.from_numpy(raw.copy()).view(_PLAIN[stored.kind]).reshape(stored.shape)
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(stored.kind)
        elements, size = GGML_QUANT_SIZES[kind]
        values = np.empty(math.prod(stored.shape), np.float32)
        step = _CHUNK // elements
        for block in range(0, stored.size // size, step):
            # Blocks do not depend on rows. As one long row they avoid `dequantize`'s loop over rows.
            row = raw[block * size : (block + step) * size]
            values[block * elements : (block + step) * elements] = dequantize(row, kind)
        return torch.from_numpy(values).reshape(stored.shape)
