"""`config.json` as every runtime reads it: the class, the mask in the key of each family, all numbers spelled out.

Which runtime reads which key (versions of November 2026):

    transformers       `is_causal` since 5.2 (PR 43705); for Gemma 3 `use_bidirectional_attention`
    vLLM               `is_causal` for Llama, Mistral and Qwen; for Gemma 3 the other key, and it refuses both together
    TEI                `use_bidirectional_attention`; for Qwen2 `is_causal`; it has no default for many numbers
    mlx-embeddings,    `rope_theta` and `rope_scaling`, not the table `rope_parameters`
    transformers 4

Gemma 3 with `use_bidirectional_attention` states its window on both sides of a token together, and with both keys
transformers' window is off by one.
"""

from collections.abc import Mapping
from typing import Any

_CLASSES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
# Values that the defining code assumes where a config says nothing, and that TEI calls for.
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "mlp_bias": False},
    "mistral": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu"},
    "gemma": _GELU,
    "gemma2": _GELU,
    "gemma3_text": {**_GELU, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10000.0},
}
_QWEN_NUMBERS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
}
# Numbers that transformers' config classes give a config without them, as of version 5; a test compares them. A
# multimodal config.json leaves out what its decoder's class says. Null is no missing value: it states "no window", or
# as many key-value heads as heads.
CLASS_NUMBERS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_NUMBERS,
    "qwen3": _QWEN_NUMBERS,
    "gemma": {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "max_position_embeddings": 8192,
    },
    **{
        family: {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "max_position_embeddings": positions,
            "sliding_window": 4096,
        }
        for family, positions in (("gemma2", 8192), ("gemma3_text", 131072))
    },
}
# Sizes that decide how weights are read: a config.json of a decoder alone that lacks one is damaged.
_SIZES = ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_class_numbers(config: Mapping[str, Any], is_part: bool) -> dict[str, Any]:
    """Return a decoder's configuration with the numbers that the config class of its family adds.

    Args:
        config: as read from a file; a family that is not in the table is returned as it is.
        is_part: it is the part of a multimodal one, where sizes may be missing too.
    """
    family = str(config["model_type"])
    numbers = CLASS_NUMBERS.get("gemma3_text" if family == "gemma3" else family, {})
    filled = {key: value for key, value in numbers.items() if is_part or key not in _SIZES} | dict(config)
    heads, groups = filled.get("num_attention_heads"), filled.get("num_key_value_heads")
    if "num_key_value_heads" not in config and isinstance(heads, int) and groups and heads % groups:
        del filled["num_key_value_heads"]  # the weights cannot be shaped so; as many as heads is the older default
    return filled


def hub_config(config: Mapping[str, Any], causal: bool) -> dict[str, Any]:
    """Return a decoder's configuration with its class, its mask and its defaults spelled out.

    Args:
        config: of a checkpoint. A family without a class here gets `is_causal` alone.
        causal: the decoder keeps its causal mask.
    """
    family = str(config.get("model_type"))
    if family not in _CLASSES:
        return {**config, "is_causal": causal}
    spelled = _with_old_rope_keys(config)
    for key, value in (_DEFAULTS | _FAMILY_DEFAULTS[family]).items():
        if spelled.get(key) is None:
            spelled[key] = value
    if family == "gemma3_text" and "sliding_window_pattern" in spelled:
        spelled["_sliding_window_pattern"] = spelled["sliding_window_pattern"]
    if family.startswith("qwen") and "layer_types" not in spelled:
        spelled.setdefault("use_sliding_window", False)
    for key in _TOKENS:
        if isinstance(spelled.get(key), list):
            spelled[key] = spelled[key][0]  # TEI reads one number
    if spelled.get("pad_token_id") is None:
        spelled["pad_token_id"] = spelled.get("eos_token_id")  # as LLM2Vec pads
    spelled.setdefault("num_key_value_heads", spelled.get("num_attention_heads"))
    spelled["architectures"] = [_CLASSES[family]]
    return _with_mask(spelled, family, causal)


def _with_mask(config: dict[str, Any], family: str, causal: bool) -> dict[str, Any]:
    bidirectional = bool(config.pop("use_bidirectional_attention", False))
    if family != "gemma3_text":
        return config | ({"is_causal": True} if causal else {"is_causal": False, "use_bidirectional_attention": True})
    config.pop("is_causal", None)
    if (window := config.get("sliding_window")) and bidirectional == causal:
        config["sliding_window"] = window // 2 if causal else 2 * window
    return config | ({"is_causal": True} if causal else {"use_bidirectional_attention": True})


def _with_old_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace transformers 5's `rope_parameters` by the keys that every reader has, where they say as much."""
    spelled = dict(config)
    tables = spelled.get("rope_parameters")
    if not isinstance(tables, Mapping) or not tables:
        spelled.pop("rope_parameters", None)
        return spelled
    full = tables.get("full_attention", tables)
    local = tables.get("sliding_attention")
    plain_local = local is None or (local.get("rope_type") or "default") == "default"
    if not plain_local or spelled.get("rope_scaling") not in (None, tables):
        return spelled
    del spelled["rope_parameters"]
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    if "rope_theta" in full:
        spelled["rope_theta"] = full["rope_theta"]
    if local is not None and "rope_theta" in local:
        spelled["rope_local_base_freq"] = local["rope_theta"]
    is_plain = (scaling.get("rope_type") or "default") == "default" and len(scaling) <= 1
    spelled["rope_scaling"] = None if is_plain else scaling
    return spelled
