"""Decoder architectures as data: one row per family, one `Shape` per checkpoint.

A row holds the properties of every checkpoint of a `model_type`; `shape_of` adds the numbers of one `config.json`.
The forward in `decoder.py` reads only the Shape. To add a family, add a row; if it needs something no row has,
add the field there and one branch to the forward.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.errors import CheckpointError, UnsupportedArchitecture

_MODELING = "https://github.com/huggingface/transformers/blob/main/src/transformers/models"


@dataclass(frozen=True)
class Architecture:
    """Properties of all checkpoints of one `model_type`.

    Attributes:
        source: URL of the defining code.
        norm_offset: RMSNorm multiplies by (norm_offset + weight); Gemma stores its weights around zero.
        embedding_scaled: token embeddings are multiplied by sqrt(hidden_size).
        qkv_bias: biases on query, key and value: always, never, or as `attention_bias` in the config says (None).
        out_bias: a bias on the attention output, read from `attention_bias`.
        qk_norm: an RMSNorm over each query and key head.
        sandwich_norm: norms after attention and MLP as well as before.
        sliding_every: k > 0: every k-th layer attends fully and the others within the window; 0: by `layer_types`
            or `max_window_layers`; None: all layers use the window, where the config has one.
        local_theta: RoPE base of the sliding layers, where it differs.
        tied_scale: attention is scaled by `query_pre_attn_scalar`, not by the head size.
        softcapped: attention scores are squashed by `attn_logit_softcapping`.
        states_whole_window: with `use_bidirectional_attention`, `sliding_window` counts both sides of a token.
        default_*: what the defining code assumes where a config says nothing.
    """

    source: str
    activation: str = "silu"
    norm_offset: float = 0.0
    embedding_scaled: bool = False
    qkv_bias: bool | None = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    sliding_every: int | None = 0
    local_theta: float | None = None
    tied_scale: bool = False
    softcapped: bool = False
    states_whole_window: bool = False
    default_softcap: float | None = None
    default_theta: float = 10_000.0
    default_head_dim: int | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(f"{_MODELING}/llama/modeling_llama.py", qkv_bias=None, out_bias=True, mlp_bias=True),
    "mistral": Architecture(f"{_MODELING}/mistral/modeling_mistral.py", sliding_every=None),
    "qwen2": Architecture(f"{_MODELING}/qwen2/modeling_qwen2.py", qkv_bias=True),
    "qwen3": Architecture(
        f"{_MODELING}/qwen3/modeling_qwen3.py", qkv_bias=None, out_bias=True, qk_norm=True, default_head_dim=128
    ),
    "gemma": Architecture(
        f"{_MODELING}/gemma/modeling_gemma.py",
        activation="gelu_tanh",
        norm_offset=1.0,
        embedding_scaled=True,
        qkv_bias=None,
        out_bias=True,
        default_head_dim=256,
    ),
    "gemma2": Architecture(
        f"{_MODELING}/gemma2/modeling_gemma2.py",
        activation="gelu_tanh",
        norm_offset=1.0,
        embedding_scaled=True,
        qkv_bias=None,
        out_bias=True,
        sandwich_norm=True,
        sliding_every=2,
        tied_scale=True,
        softcapped=True,
        default_softcap=50.0,
        default_head_dim=256,
    ),
    "gemma3_text": Architecture(
        f"{_MODELING}/gemma3/modeling_gemma3.py",
        activation="gelu_tanh",
        norm_offset=1.0,
        embedding_scaled=True,
        qkv_bias=None,
        out_bias=True,
        qk_norm=True,
        sandwich_norm=True,
        sliding_every=6,
        local_theta=10_000.0,
        tied_scale=True,
        softcapped=True,
        states_whole_window=True,
        default_theta=1_000_000.0,
        default_head_dim=256,
    ),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    # Gemma 1 configs say "gelu" or nothing and mean the tanh form (transformers PR 29402).
    "gelu": "gelu_tanh",
}

# Keys of RoPE tables that hold a number, and a list of numbers.
_ROPE_NUMBERS = {
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "partial_rotary_factor"),
}
_ROPE_LISTS = {"short_factor", "long_factor"}

# Every `rope_type` that gives transformers' vectors here; the types that `Rope` lacks run through transformers.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "proportional")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (positions divided by factor) or "llama3" (long wavelengths divided by factor).
        factors: per-frequency divisors, where a file stores them instead of the rule; length head_dim / 2.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position for each pair, float32 [head_dim / 2].

        Computed in float32 from the start, as transformers does: models were trained with these roundings, and on
        some texts the last bit of a frequency is worth 1e-4 in the states.
        """
        inverse = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.factors:
            return inverse / torch.tensor(self.factors)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        # https://github.com/meta-llama/llama-models, apply_scaling: keep short waves, divide long ones, blend between.
        wavelength = 2 * math.pi / inverse
        blend = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * inverse / self.factor + blend * inverse
        long = wavelength > self.original_context / self.low_freq_factor
        short = wavelength < self.original_context / self.high_freq_factor
        return torch.where(short, inverse, torch.where(long, inverse / self.factor, blended))


@dataclass(frozen=True)
class Shape:
    """All numbers of one checkpoint that the forward uses. Sizes in elements.

    Attributes:
        windows: per layer, the farthest distance |i - j| a token may attend over, or None for any.
        ropes: per layer.
    """

    vocabulary: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    activation: str
    norm_offset: float
    embedding_scale: float
    attention_scale: float
    softcap: float | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sandwich_norm: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds of the linear layers, times two; attention itself (quadratic in length) not counted."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * self.layers * (attention + 3 * self.hidden_size * self.intermediate_size)


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The Shape that a config describes, or None if the table has no row for it (or not for this variant).

    Raises:
        CheckpointError: a row exists, but a required number is missing or impossible.
        UnsupportedArchitecture: the config names a RoPE type that is not in ROPE_TYPES.
    """
    require_known_rope(config)
    row = ARCHITECTURES.get(_model_type(config))
    if row is None:
        return None
    activation = config.get("hidden_activation") or config.get("hidden_act") or row.activation
    if _ACTIVATIONS.get(activation, activation) != row.activation:
        return None
    layers = _number(config, "num_hidden_layers")
    heads = _number(config, "num_attention_heads")
    hidden_size = _number(config, "hidden_size")
    head_dim = int(config.get("head_dim") or row.default_head_dim or hidden_size // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if head_dim % 2 or heads % kv_heads:
        raise CheckpointError(
            f"config.json: head_dim {head_dim} must be even and {heads} heads divisible by {kv_heads} key-value heads"
        )
    windows = _windows(config, row, layers)
    ropes = _ropes(config, row, windows)
    if ropes is None:
        return None
    biased = bool(config.get("attention_bias", False))
    softcap = config.get("attn_logit_softcapping", row.default_softcap) if row.softcapped else None
    scalar = float(config.get("query_pre_attn_scalar") or 256) if row.tied_scale else head_dim
    return Shape(
        vocabulary=_number(config, "vocab_size"),
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_number(config, "intermediate_size"),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=row.activation,
        norm_offset=row.norm_offset,
        embedding_scale=math.sqrt(hidden_size) if row.embedding_scaled else 1.0,
        attention_scale=scalar**-0.5,
        softcap=float(softcap) if softcap else None,
        qkv_bias=biased if row.qkv_bias is None else row.qkv_bias,
        out_bias=row.out_bias and biased,
        mlp_bias=row.mlp_bias and bool(config.get("mlp_bias", False)),
        qk_norm=row.qk_norm,
        sandwich_norm=row.sandwich_norm,
        windows=windows,
        ropes=ropes,
    )


def _model_type(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type", ""))
    # A multimodal Gemma 3 file names its decoder by the whole model's type.
    return "gemma3_text" if kind == "gemma3" else kind


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a positive whole number")
    return value


def _windows(config: Mapping[str, Any], row: Architecture, layers: int) -> tuple[int | None, ...]:
    """Per layer, the attention window as a distance; None attends to everything.

    transformers' bidirectional sliding mask keeps |i - j| <= sliding_window; a Gemma 3 that was trained bidirectionally
    (`use_bidirectional_attention`) states the whole width, half of it on either side.
    """
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return (None,) * layers
    if row.states_whole_window and config.get("use_bidirectional_attention"):
        window = window // 2
    kinds = config.get("layer_types")
    if kinds is not None:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    every = config.get("sliding_window_pattern", row.sliding_every)
    if row.sliding_every is None:
        return (int(window),) * layers
    if every:
        return tuple(None if (i + 1) % every == 0 else int(window) for i in range(layers))
    if config.get("use_sliding_window"):
        start = int(config.get("max_window_layers", 28))
        return tuple(int(window) if i >= start else None for i in range(layers))
    return (None,) * layers


def require_known_rope(config: Mapping[str, Any]) -> None:
    """Check the names of all RoPE types in a config, and their numbers.

    Raises:
        UnsupportedArchitecture: a type is not in ROPE_TYPES, so its vectors have never been compared.
        CheckpointError: a number is none that a position can be scaled by; transformers only warns of it.
    """
    for kind in rope_types(config):
        if kind not in ROPE_TYPES:
            raise UnsupportedArchitecture(
                f"config.json: RoPE scaling of type {kind!r} is not supported; known types: {', '.join(ROPE_TYPES)}"
            )

    for name, value in _rope_numbers(config):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"config.json: {name}={value!r:.80} of the RoPE scaling is no number above 0")
    for table in _rope_tables(config):
        low, high = table.get("low_freq_factor"), table.get("high_freq_factor")
        if low is not None and high is not None and high <= low:
            raise CheckpointError(
                f"config.json: high_freq_factor={high} of the RoPE scaling is not above low_freq_factor={low}"
            )
        lengths = {key: len(table[key]) for key in sorted(_ROPE_LISTS) if key in table}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"config.json: {lengths} of the RoPE scaling are lists of different lengths")


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """RoPE types that a config names, old and new keys, for all kinds of layers."""
    kinds = (part.get("rope_type") or part.get("type") for part in _rope_tables(config))
    return {str(kind) for kind in kinds if kind is not None}


def _rope_tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("rope_parameters", "rope_scaling"):
        table = config.get(key)
        if isinstance(table, Mapping):
            yield table
            yield from (value for value in table.values() if isinstance(value, Mapping))
        elif table is not None:
            raise CheckpointError(f"config.json: {key}={table!r:.80} is no table")


def _rope_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every number of the tables by its key. Null stands for the default where a table may leave the number out."""
    yield from ((key, config[key]) for key in ("rope_theta", "rope_local_base_freq") if config.get(key) is not None)
    yield from (("rope_factors", value) for value in config.get("rope_factors") or ())
    for table in _rope_tables(config):
        for key in _ROPE_NUMBERS & table.keys():
            if table[key] is not None:
                yield key, table[key]
        for key in _ROPE_LISTS & table.keys():
            values = table[key] if isinstance(table[key], list) else [table[key]]
            yield from ((key, value) for value in values)


def _ropes(config: Mapping[str, Any], row: Architecture, windows: tuple[int | None, ...]) -> tuple[Rope, ...] | None:
    parameters = config.get("rope_parameters") or {}
    # transformers 5 writes one table, or one per kind of layer; earlier configs have rope_theta and rope_scaling.
    whole = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention")
    scaling = config.get("rope_scaling") or {}
    if scaling and parameters and scaling != parameters:
        return None  # two tables that differ: transformers knows which one it reads
    theta = float(whole.get("rope_theta") or scaling.get("rope_theta") or config.get("rope_theta") or row.default_theta)
    full = _rope(theta, whole if whole.get("rope_type") else scaling, config)
    if full is None:
        return None
    if row.local_theta is None:
        return (full,) * len(windows)
    local_theta = (local or {}).get("rope_theta") or config.get("rope_local_base_freq") or row.local_theta
    sliding = _rope(float(local_theta), local or {}, config)
    if sliding is None:
        return None
    return tuple(full if window is None else sliding for window in _kinds(config, row, windows))


def _kinds(config: Mapping[str, Any], row: Architecture, windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Windows as RoPE sees them: sliding layers keep their own frequencies even if the window is switched off."""
    if any(window is not None for window in windows):
        return windows
    return _windows({**config, "sliding_window": 1}, row, len(windows))


def _rope(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Rope | None:
    if config.get("rope_factors"):
        return Rope(theta, factors=tuple(float(f) for f in config["rope_factors"]))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind == "default":
        return Rope(theta)
    if kind == "linear" and share == 1.0 and "factor" in scaling:
        return Rope(theta, kind, float(scaling["factor"]))
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    # transformers lets a number beside the table replace the one in it.
    outside = config.get("original_max_position_embeddings")
    if kind == "llama3" and share == 1.0 and outside is None and all(key in scaling for key in keys):
        factor, low, high, original = (scaling[key] for key in keys)
        return Rope(theta, kind, float(factor), float(low), float(high), int(original))
    return None  # transformers knows the other types, and says which number is missing
