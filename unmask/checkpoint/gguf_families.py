"""Families of GGUF files: names and shapes of tensors, and the changes that llama.cpp's converter makes to them.

One table serves reading (`gguf`) and writing (`export.gguf_file`):
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ROPE_FACTORS = "rope_freqs.weight"

# A tensor's name without `.weight` -> the hub's, and a letter per dimension of its weight, outermost first:
# V vocabulary, H hidden, Q all query heads, K all key heads, D one head, I feed-forward.
_OUTER = {
    "token_embd": ("embed_tokens", "VH"),
    "output_norm": ("norm", "H"),
    "output": ("lm_head", "VH"),
}
_LLAMA_BLOCK = {
    "attn_norm": ("input_layernorm", "H"),
    "attn_q": ("self_attn.q_proj", "QH"),
    "attn_k": ("self_attn.k_proj", "KH"),
    "attn_v": ("self_attn.v_proj", "KH"),
    "attn_output": ("self_attn.o_proj", "HQ"),
    "ffn_norm": ("post_attention_layernorm", "H"),
    "ffn_gate": ("mlp.gate_proj", "IH"),
    "ffn_up": ("mlp.up_proj", "IH"),
    "ffn_down": ("mlp.down_proj", "HI"),
}
_HEAD_NORMS = {"attn_q_norm": ("self_attn.q_norm", "D"), "attn_k_norm": ("self_attn.k_norm", "D")}
_GEMMA2_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": ("post_attention_layernorm", "H"),
    "ffn_norm": ("pre_feedforward_layernorm", "H"),
    "post_ffw_norm": ("post_feedforward_layernorm", "H"),
}


@dataclass(frozen=True)
class GgufFamily:
    """Facts about an architecture that a GGUF file does not contain.

    Attributes:
        block: the tensors of a layer.
        constants: entries of the hub's config.json; a field of the file overrides them.
        interleaved: tensors whose rows the converter reordered for llama.cpp's rotary layout, and the config
            entry that counts their heads.
        norm_offset: number that the converter added to every norm weight.
        wide_depth: the depth of the one model whose query scalar is hidden_size / heads, not head_dim.
    """

    block: Mapping[str, tuple[str, str]]
    constants: Mapping[str, Any]
    interleaved: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    wide_depth: int | None = None


_SILU = {"hidden_act": "silu", "rope_theta": 10000.0}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0}
# https://huggingface.co/google/gemma-2-9b/blob/main/config.json and gemma-3-4b-pt
_GEMMA2 = _GELU | {"sliding_window": 4096, "sliding_window_pattern": 2}
GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = _GELU | {"sliding_window": 1024, "sliding_window_pattern": 6}
_GEMMA3_ROPE = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
_LLAMA = GgufFamily(
    _LLAMA_BLOCK,
    {"model_type": "llama"} | _SILU,
    interleaved={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
)
FAMILIES = {
    # Files of Mistral have the architecture llama as well; nothing in a file tells the two apart.
    "llama": _LLAMA,
    "llama-embed": _LLAMA,  # the converter's name of LlamaBidirectionalModel
    "qwen2": GgufFamily(_LLAMA_BLOCK, {"model_type": "qwen2"} | _SILU),
    "qwen3": GgufFamily(_LLAMA_BLOCK | _HEAD_NORMS, {"model_type": "qwen3"} | _SILU),
    "gemma": GgufFamily(_LLAMA_BLOCK, {"model_type": "gemma"} | _GELU, norm_offset=1.0),
    "gemma2": GgufFamily(
        _GEMMA2_BLOCK, {"model_type": "gemma2"} | _GEMMA2 | GEMMA2_CAPS, norm_offset=1.0, wide_depth=46
    ),
    "gemma3": GgufFamily(
        _GEMMA2_BLOCK | _HEAD_NORMS,
        {"model_type": "gemma3_text"} | _GEMMA3 | _GEMMA3_ROPE,
        norm_offset=1.0,
        wide_depth=62,
    ),
    # Gemma 3 with a window on both sides, stated together; llama.cpp's name for EmbeddingGemma.
    "gemma-embedding": GgufFamily(
        _GEMMA2_BLOCK | _HEAD_NORMS,
        {"model_type": "gemma3_text", "use_bidirectional_attention": True} | _GEMMA3 | _GEMMA3_ROPE,
        norm_offset=1.0,
        wide_depth=62,
    ),
}


def layout_of(family: GgufFamily, config: Mapping[str, Any], vocabulary: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return, for every tensor that the model may have: name in the file -> the hub's name and the shape."""
    sizes = {
        "V": vocabulary,
        "H": config["hidden_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
        "D": config["head_dim"],
        "I": config["intermediate_size"],
    }
    layout = {ROPE_FACTORS: (ROPE_FACTORS, (config["head_dim"] // 2,))}
    blocks = [("", "", _OUTER)]
    blocks += [(f"blk.{n}.", f"layers.{n}.", family.block) for n in range(config["num_hidden_layers"])]
    for outer, hub_outer, parts in blocks:
        for part, (hub_part, letters) in parts.items():
            shape = tuple(sizes[letter] for letter in letters)
            layout[f"{outer}{part}.weight"] = f"{hub_outer}{hub_part}.weight", shape
            if outer and len(shape) == 2:  # a linear map inside a layer
                layout[f"{outer}{part}.bias"] = f"{hub_outer}{hub_part}.bias", shape[:1]
    return layout


def undo_conversion(family: GgufFamily, config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a file's tensor as the hub has it.

    Args:
        config: of the model, for its numbers of heads.
        name: the hub's.
    """
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() - family.norm_offset
    if (heads := _interleaved_heads(family, config, name)) is not None:
        # Rows of a head: pairs (0, d/2), (1, d/2 + 1), ... in the file, first half then second half here.
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])  # [heads, d/2, 2, hidden]
        return pairs.transpose(1, 2).reshape(tensor.shape)
    return tensor


def convert(family: GgufFamily, config: Mapping[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the hub as a file has it: the inverse of `undo_conversion`."""
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    if (heads := _interleaved_heads(family, config, name)) is not None:
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # [heads, 2, d/2, hidden]
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _interleaved_heads(family: GgufFamily, config: Mapping[str, Any], name: str) -> int | None:
    part = name.split(".", 2)[-1].rpartition(".")[0]  # layers.0.self_attn.q_proj.bias: self_attn.q_proj
    entry = family.interleaved.get(part)
    return None if entry is None else int(config[entry])
