"""Every row of the architecture table against transformers, and against what an encoder must be."""

import json
from typing import Any

import pytest
import torch

from unmask.encoder.model.architectures import ARCHITECTURES, ROPE_TYPES, Rope, shape_of
from unmask.encoder.model.attention import length_groups
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.model.transformers_decoder import TransformersDecoder
from unmask.errors import CheckpointError, UnsupportedArchitecture

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 120,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3 rope": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama linear rope": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma3 bidirectional": {"model_type": "gemma3_text", "sliding_window": 8, "use_bidirectional_attention": True},
}


class StateDict:
    """A tensor source over a model in memory."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def names(self) -> list[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]


def transformers_model(config: dict[str, Any], causal: bool = False) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    values = {**SMALL, **config}
    if not config.get("use_bidirectional_attention"):  # such a model needs no other switch, and none is meant for it
        values["is_causal"] = causal
    # Eager attention is the only one that knows Gemma 2's soft cap.
    built = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(7)
    model = AutoModel.from_config(built, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that every term matters, norms and biases off their neutral start.
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.08))
    return model


def ours(config: dict[str, Any], model: torch.nn.Module, causal: bool = False) -> Decoder:
    shape = shape_of({**SMALL, **config})
    assert shape is not None
    return Decoder.load(shape, StateDict(model.state_dict()), torch.float32, "cpu", causal)


def test_every_row_has_a_variant() -> None:
    assert {variant["model_type"] for variant in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_hidden_states_match_transformers(variant: str) -> None:
    model = transformers_model(VARIANTS[variant])
    decoder = ours(VARIANTS[variant], model)
    lengths = [37, 11, 11, 1]
    ids = torch.randint(1, 120, (sum(lengths),))
    states = decoder(ids, lengths)
    for sequence, mine in zip(ids.split(lengths), states.split(lengths), strict=True):
        theirs = model(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
        assert (mine - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bidirectional" not in name])
@torch.no_grad()
def test_the_causal_mask_can_be_kept(variant: str) -> None:
    model = transformers_model(VARIANTS[variant], causal=True)
    decoder = ours(VARIANTS[variant], model, causal=True)
    lengths = [37, 11, 11, 1]
    ids = torch.randint(1, 120, (sum(lengths),))
    states = decoder(ids, lengths)
    for sequence, mine in zip(ids.split(lengths), states.split(lengths), strict=True):
        theirs = model(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
        assert (mine - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_later_token_changes_earlier_states(variant: str) -> None:
    decoder = ours(VARIANTS[variant], transformers_model(VARIANTS[variant]))
    ids = torch.arange(1, 6)
    changed = ids.clone()
    changed[-1] = 100
    before, after = decoder(ids, [5]), decoder(changed, [5])
    assert ((before[:4] - after[:4]).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_batch_one_equals_batch_n(variant: str) -> None:
    decoder = ours(VARIANTS[variant], transformers_model(VARIANTS[variant]))
    lengths = [40, 40, 23, 9, 9, 9, 2, 1]
    ids = torch.randint(1, 120, (sum(lengths),))
    together = decoder(ids, lengths).split(lengths)
    for sequence, state in zip(ids.split(lengths), together, strict=True):
        alone = decoder(sequence, [len(sequence)])
        assert (alone - state).norm() / alone.norm() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant: str) -> None:
    decoder = ours(VARIANTS[variant], transformers_model(VARIANTS[variant]))
    with torch.inference_mode():  # serving first must not spoil training after
        decoder(torch.arange(1, 31), [20, 10])
    decoder(torch.arange(1, 31), [20, 10]).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_llama3_frequencies_match_transformers() -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    config = AutoConfig.for_model("llama", **{**SMALL, "head_dim": 128, "rope_theta": 5e5, "rope_scaling": scaling})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    mine = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192).frequencies(128)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_stored_factors_equal_the_rule() -> None:
    """GGUF files of Llama 3 store divisors instead of the rule that made them."""
    plain, scaled = Rope(5e5).frequencies(64), Rope(5e5, "llama3", 8.0).frequencies(64)
    factors = tuple((plain / scaled).tolist())
    torch.testing.assert_close(Rope(5e5, factors=factors).frequencies(64), scaled)


@torch.no_grad()
def test_a_decoder_without_a_row_runs_through_transformers() -> None:
    config = {"model_type": "olmo2"}
    model = transformers_model(config)
    assert shape_of({**SMALL, **config}) is None
    decoder = TransformersDecoder.load({**SMALL, **config}, StateDict(model.state_dict()), torch.float32, "cpu")
    lengths = [12, 5, 5]
    ids = torch.randint(1, 120, (sum(lengths),))
    states = decoder(ids, lengths)
    for sequence, mine in zip(ids.split(lengths), states.split(lengths), strict=True):
        theirs = model(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
        assert (mine - theirs).norm() / theirs.norm() <= 1e-5


RECURRENT = {"linear_num_value_heads": 2, "linear_num_key_heads": 2} | dict.fromkeys(
    ("linear_key_head_dim", "linear_value_head_dim"), 8
)
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
# Families of which some layers, or a part of each layer, have no mask that could be taken away.
HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "convolutions first": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, r"\(0: conv\)"),
    "convolutions last": ({"model_type": "lfm2", "layer_types": ["full_attention", "conv"]}, r"\(1: conv\)"),
    "linear attention": (
        {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], **RECURRENT},
        r"\(0: linear_attention\)",
    ),
    "beside attention": ({"model_type": "falcon_h1", "mamba_d_ssm": 64, **MAMBA}, r"\(0, 1: hybrid\)"),
}


def hybrid(name: str) -> tuple[dict[str, Any], StateDict]:
    """The config as transformers saves it, and the weights."""
    from transformers import AutoConfig, AutoModel

    built = AutoConfig.for_model(**{**SMALL, "num_hidden_layers": 2, "pad_token_id": 0, **HYBRIDS[name][0]})
    torch.manual_seed(0)
    return json.loads(built.to_json_string()), StateDict(AutoModel.from_config(built).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_decoder_with_causal_layers_is_no_encoder(name: str, dtype: torch.dtype) -> None:
    config, state = hybrid(name)
    with pytest.raises(UnsupportedArchitecture, match=f"stays causal in transformers in . layers {HYBRIDS[name][1]}"):
        TransformersDecoder.load(config, state, dtype, "cpu")
    TransformersDecoder.load(config, state, dtype, "cpu", causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "cohere2"])
def test_experts_and_windows_do_not_look_causal(kind: str, dtype: torch.dtype) -> None:
    config = {"model_type": kind, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config |= {"sliding_window": 2, "pad_token_id": 0}
    state = StateDict(transformers_model(config).state_dict())
    TransformersDecoder.load({**SMALL, **config}, state, dtype, "cpu")


def test_a_config_with_infinity_is_read_as_transformers_saves_it() -> None:
    config, state = hybrid("beside attention")
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    TransformersDecoder.load(config, state, torch.float32, "cpu", causal=True)
    config["time_step_limit"] = ["long", {"__float__": "Infinity"}]
    with pytest.raises(CheckpointError, match=r"config\.json is not one of 'falcon_h1': .*time_step_limit"):
        TransformersDecoder.load(config, state, torch.float32, "cpu", causal=True)


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedArchitecture, match="'no-such-model'"):
        TransformersDecoder.load({"model_type": "no-such-model"}, StateDict({}), torch.float32, "cpu")


def test_a_row_does_not_swallow_an_unknown_rope() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert shape_of({**SMALL, "model_type": "llama", "rope_scaling": yarn}) is None


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**LLAMA3_ROPE},
    "llama3 with its base in the table": {**LLAMA3_ROPE, "rope_theta": 500_000.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with its factor alone": {"factor": 4.0},
    "yarn with mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 20,
        "beta_slow": 2,
    },
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.2 * i for i in range(8)],
        "long_factor": [1.5 + 0.7 * i for i in range(8)],
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}


def test_every_rope_type_of_transformers_is_compared() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tested = {name.split()[0] for name in ROPES}
    assert tested == set(ROPE_TYPES)
    assert tested >= set(ROPE_INIT_FUNCTIONS) | {"default"}


def rope_decoder(config: dict[str, Any], model: torch.nn.Module) -> torch.nn.Module:
    full = {**SMALL, **config}
    shape = shape_of(full)
    state = StateDict(model.state_dict())
    if shape is None:
        return TransformersDecoder.load(full, state, torch.float32, "cpu")
    return Decoder.load(shape, state, torch.float32, "cpu")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_rope_types_match_transformers_in_any_batch(name: str, key: str) -> None:
    table = {"rope_type": name.split()[0], "rope_theta": 10_000.0, **ROPES[name]}  # may hold a theta of its own
    config = {"model_type": "llama", "max_position_embeddings": 32, "rope_theta": 10_000.0, key: table}
    model = transformers_model(config)
    decoder = rope_decoder(config, model)
    for lengths in ([50, 11, 11, 1], [11, 40], [33, 17], [9, 9]):  # below, between and beyond both context lengths
        ids = torch.randint(1, 120, (sum(lengths),))
        states = decoder(ids, lengths)
        for sequence, mine in zip(ids.split(lengths), states.split(lengths), strict=True):
            fresh = transformers_model(config)  # "dynamic" remembers the longest sequence
            theirs = fresh(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
            assert (mine - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2"])
def test_an_unknown_rope_type_is_refused_by_name(kind: str) -> None:
    for table in (
        {"rope_type": "spiral", "factor": 2.0},
        {"type": "spiral"},
        {"full_attention": {"rope_type": "spiral"}},
    ):
        for key in ("rope_scaling", "rope_parameters"):
            with pytest.raises(UnsupportedArchitecture, match="'spiral'"):
                shape_of({**SMALL, "model_type": kind, key: table})


WRONG_NUMBERS: list[dict[str, Any]] = [
    *({"rope_type": "linear", "factor": value} for value in (0, -2.0, float("nan"), float("inf"), "4.0", True, [4.0])),
    {**LLAMA3_ROPE, "low_freq_factor": 0.0},
    {**LLAMA3_ROPE, "high_freq_factor": LLAMA3_ROPE["low_freq_factor"]},
    {**LLAMA3_ROPE, "original_max_position_embeddings": -1},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": "10000"},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"},
    {"rope_type": "dynamic", "factor": 0.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.0},
    {**ROPES["longrope"], "rope_type": "longrope", "short_factor": [0.0] * 8},
    {**ROPES["longrope"], "rope_type": "longrope", "long_factor": "long"},
    {"full_attention": {"rope_type": "linear", "factor": 0}},
]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("table", WRONG_NUMBERS, ids=lambda table: str(table)[:60])
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_number_that_scales_no_position_is_refused_by_name(kind: str, table: dict[str, Any], key: str) -> None:
    """transformers warns at most, and its vectors are then NaN or of another meaning."""
    with pytest.raises(CheckpointError, match=r"config\.json: \w+=.* of the RoPE scaling"):
        shape_of({**SMALL, "model_type": kind, key: table})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", 4.0, ["linear"], True])
def test_a_rope_that_is_no_table_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key}=.* is no table"):
        shape_of({**SMALL, "model_type": "llama", key: value})


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
def test_factors_of_another_length_are_no_traceback(key: str) -> None:
    table = {"rope_type": "longrope", **ROPES["longrope"], key: [1.0] * 5}
    model = transformers_model({"model_type": "llama"})
    with pytest.raises((CheckpointError, UnsupportedArchitecture)):
        decoder = rope_decoder({"model_type": "llama", "rope_scaling": table}, model)
        decoder(torch.ones(40, dtype=torch.int64), [40])


@pytest.mark.parametrize("kind", [kind for kind in ROPE_TYPES if kind != "default"])
def test_a_rope_without_its_numbers_is_no_traceback(kind: str) -> None:
    config = {**SMALL, "model_type": "llama", "rope_scaling": {"rope_type": kind}}
    model = transformers_model({"model_type": "llama"})
    try:
        rope_decoder({"model_type": "llama", "rope_scaling": {"rope_type": kind}}, model)
    except (CheckpointError, UnsupportedArchitecture) as error:
        assert kind in str(error) or "factor" in str(error), config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "divisible"),
    ],
)
def test_impossible_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_of({**SMALL, "model_type": "llama", **change})


def test_wrong_missing_and_left_over_tensors_are_named() -> None:
    state = dict(transformers_model({"model_type": "llama"}).state_dict())
    shape = shape_of({**SMALL, "model_type": "llama"})
    assert shape is not None

    def load(changed: dict[str, torch.Tensor]) -> None:
        Decoder.load(shape, StateDict(changed), torch.float32, "cpu")

    name = "layers.2.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight \[96, 63\]"):
        load({**state, name: torch.zeros(96, 63)})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors.*layers\.2\.mlp\.up_proj\.weight"):
        load({key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match=r"no place for.*layers\.0\.self_attn\.q_proj\.bias"):
        load({**state, "layers.0.self_attn.q_proj.bias": torch.zeros(64)})


def test_runs_cover_all_tokens_once() -> None:
    assert length_groups([5, 5, 5, 3, 1, 1]) == [(0, 3, 5), (15, 1, 3), (18, 2, 1)]
