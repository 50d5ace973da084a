"""GGUF files: what is read equals what a converter put in, and a damaged file is refused in one sentence."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.checkpoint import gguf as reader
from unmask.checkpoint.gguf import open_gguf
from unmask.errors import CheckpointError, UnsupportedArchitecture

HIDDEN, HEADS, KEY_HEADS, HEAD, WIDE, LAYERS = 64, 4, 2, 32, 96, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
TYPES = [2, 3, 3, *([6] * 256), *([1] * 5)]

Tensors = dict[str, np.ndarray]


def llama_tensors(generator: np.random.Generator, vocabulary: int = len(TOKENS)) -> Tensors:
    """Random tensors under their GGUF names, in the hub's shapes."""

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    tensors = {"token_embd.weight": random(vocabulary, HIDDEN), "output_norm.weight": random(HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": random(HIDDEN),
            f"blk.{layer}.attn_q.weight": random(HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_k.weight": random(KEY_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_v.weight": random(KEY_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_output.weight": random(HIDDEN, HEADS * HEAD),
            f"blk.{layer}.ffn_norm.weight": random(HIDDEN),
            f"blk.{layer}.ffn_gate.weight": random(WIDE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": random(WIDE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": random(HIDDEN, WIDE),
        }
    return tensors


def gemma3_tensors(generator: np.random.Generator) -> Tensors:
    tensors = llama_tensors(generator)
    for layer in range(LAYERS):
        for name, size in (
            ("post_attention_norm", HIDDEN),
            ("post_ffw_norm", HIDDEN),
            ("attn_q_norm", HEAD),
            ("attn_k_norm", HEAD),
        ):
            tensors[f"blk.{layer}.{name}.weight"] = generator.standard_normal(size, np.float32)
    return tensors


def write(
    path: Path,
    tensors: Tensors,
    architecture: str = "llama",
    fields: dict[str, Any] | None = None,
    formats: dict[str, gguf.GGMLQuantizationType] | None = None,
    heads: tuple[int, int] = (HEADS, KEY_HEADS),
) -> Path:
    """A GGUF file as llama.cpp's converter would lay it out; `formats` are those of tensors given as raw bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_key_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * 259 + [-5.0, -3.0, -4.0, -1.0, -2.0])
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in (fields or {}).items():
        add: dict[type, Callable[[str, Any], None]] = {
            str: writer.add_string,
            float: writer.add_float32,
            bool: writer.add_bool,
            int: writer.add_uint32,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(formats or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors() -> Tensors:
    return llama_tensors(np.random.default_rng(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small file, to be damaged."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    return write(path, llama_tensors(np.random.default_rng(0))).read_bytes()


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Q and K as LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py does."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def test_a_llama_file_comes_back_as_the_hub_had_it(tmp_path: Path, tensors: Tensors) -> None:
    expected = {name: tensor.copy() for name, tensor in tensors.items()}
    expected["blk.1.attn_q.bias"] = np.arange(HEADS * HEAD, dtype=np.float32)
    expected["blk.1.attn_k.bias"] = np.arange(KEY_HEADS * HEAD, dtype=np.float32)
    stored = dict(expected)
    for name in stored:
        if "attn_q" in name or "attn_k" in name:
            stored[name] = permuted(stored[name], HEADS if "attn_q" in name else KEY_HEADS)
    _, source, _, _ = open_gguf(write(tmp_path / "m.gguf", stored))
    for name, hub_name in (
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("blk.0.attn_norm.weight", "layers.0.input_layernorm.weight"),
        ("blk.0.attn_q.weight", "layers.0.self_attn.q_proj.weight"),
        ("blk.1.attn_k.weight", "layers.1.self_attn.k_proj.weight"),
        ("blk.1.attn_q.bias", "layers.1.self_attn.q_proj.bias"),
        ("blk.1.attn_k.bias", "layers.1.self_attn.k_proj.bias"),
        ("blk.0.attn_v.weight", "layers.0.self_attn.v_proj.weight"),
        ("blk.0.attn_output.weight", "layers.0.self_attn.o_proj.weight"),
        ("blk.0.ffn_norm.weight", "layers.0.post_attention_layernorm.weight"),
        ("blk.0.ffn_gate.weight", "layers.0.mlp.gate_proj.weight"),
        ("blk.0.ffn_up.weight", "layers.0.mlp.up_proj.weight"),
        ("blk.1.ffn_down.weight", "layers.1.mlp.down_proj.weight"),
    ):
        assert source.shape(hub_name) == expected[name].shape
        np.testing.assert_array_equal(source.read(hub_name).numpy(), expected[name], err_msg=hub_name)
    assert len(source.names()) == len(expected)


def test_gemma_norms_lose_the_one_that_the_converter_added(tmp_path: Path) -> None:
    tensors = gemma3_tensors(np.random.default_rng(1))
    # Multiples of 1/64 survive +1 and -1 exactly.
    tensors = {name: np.round(64 * tensor) / np.float32(64) for name, tensor in tensors.items()}
    stored = {
        name: tensor + np.float32(1) if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()
    }
    _, source, _, _ = open_gguf(write(tmp_path / "m.gguf", stored, "gemma3"))
    for name, hub_name in (
        ("output_norm.weight", "norm.weight"),
        ("blk.0.attn_norm.weight", "layers.0.input_layernorm.weight"),
        ("blk.0.post_attention_norm.weight", "layers.0.post_attention_layernorm.weight"),
        ("blk.0.ffn_norm.weight", "layers.0.pre_feedforward_layernorm.weight"),
        ("blk.0.post_ffw_norm.weight", "layers.0.post_feedforward_layernorm.weight"),
        ("blk.1.attn_q_norm.weight", "layers.1.self_attn.q_norm.weight"),
        ("blk.1.attn_k_norm.weight", "layers.1.self_attn.k_norm.weight"),
        ("blk.1.attn_q.weight", "layers.1.self_attn.q_proj.weight"),
    ):
        np.testing.assert_array_equal(source.read(hub_name).numpy(), tensors[name], err_msg=hub_name)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_blocks_are_dequantised_in_chunks_as_in_one(
    tmp_path: Path, tensors: Tensors, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", 320)  # divides neither a row nor the tensor
    name = "blk.0.ffn_up.weight"
    format_ = gguf.GGMLQuantizationType[kind]
    raw = quantize(tensors[name], format_)
    _, source, _, _ = open_gguf(write(tmp_path / "m.gguf", {**tensors, name: raw}, formats={name: format_}))
    read = source.read("layers.0.mlp.up_proj.weight")
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), dequantize(raw, format_))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F64", torch.float64)])
def test_plain_numbers_keep_their_precision(tmp_path: Path, tensors: Tensors, kind: str, dtype: torch.dtype) -> None:
    name = "blk.0.ffn_up.weight"
    expected = torch.from_numpy(tensors[name]).to(dtype)
    raw = expected.view(torch.uint8).numpy()
    formats = {name: gguf.GGMLQuantizationType[kind]}
    _, source, _, _ = open_gguf(write(tmp_path / "m.gguf", {**tensors, name: raw}, formats=formats))
    assert torch.equal(source.read("layers.0.mlp.up_proj.weight"), expected)


def test_the_config_is_in_the_words_of_the_hub(tmp_path: Path, tensors: Tensors) -> None:
    config, _, tokenizer, _ = open_gguf(write(tmp_path / "m.gguf", tensors, fields={"llama.rope.freq_base": 5e5}))
    assert config == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "intermediate_size": WIDE,
        "rms_norm_eps": 1e-5,  # not 9.999999747378752e-06, as which the file holds it
        "rope_theta": 5e5,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert tokenizer.prefix == (1,)


def test_gemma3_alternates_its_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", gemma3_tensors(np.random.default_rng(0)), "gemma3")
    config, _, _, _ = open_gguf(path)
    assert config["model_type"] == "gemma3_text"
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["layer_types"] == ["sliding_attention"] * LAYERS
    assert config["query_pre_attn_scalar"] == HEAD
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("architecture", "layers", "full"),
    [("gemma2", 4, [False, True, False, True]), ("gemma3", 7, [False] * 5 + [True, False])],
)
def test_which_layers_see_everything(architecture: str, layers: int, full: list[bool]) -> None:
    config = config_of(architecture, {"block_count": layers})
    assert config["layer_types"] == ["full_attention" if one else "sliding_attention" for one in full]


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "heads", "head", "scalar"),
    [
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 34, 2560, 8, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
)
def test_the_query_scalar_of_published_gemmas(
    architecture: str, layers: int, hidden: int, heads: int, head: int, scalar: int
) -> None:
    fields = {
        "block_count": layers,
        "embedding_length": hidden,
        "attention.head_count": heads,
        "attention.key_length": head,
    }
    assert config_of(architecture, fields)["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32768,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
    ],
)
def test_stretched_positions(fields: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert config_of("qwen2", fields)["rope_scaling"] == scaling


def config_of(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The config of a header that is never written: real depths and widths would make large files."""
    sizes = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.key_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    named = {f"{architecture}.{name}": value for name, value in (sizes | fields).items()}
    tensors: dict[str, Any] = dict.fromkeys(map(str, range(2000)))
    header = reader._Header(Path("m.gguf"), None, named, tensors)  # pyright: ignore[reportArgumentType]
    return reader._config(header, architecture)


def test_llama3_factors_are_handed_on(tmp_path: Path, tensors: Tensors) -> None:
    factors = np.linspace(1, 32, HEAD // 2, dtype=np.float32)
    config, source, _, _ = open_gguf(write(tmp_path / "m.gguf", {**tensors, "rope_freqs.weight": factors}))
    assert config["rope_factors"] == pytest.approx(factors.tolist())
    assert "rope_freqs.weight" not in source.names()


def test_an_output_matrix_unties_the_embedding(tmp_path: Path, tensors: Tensors) -> None:
    output = tensors["token_embd.weight"] + 1
    config, source, _, _ = open_gguf(write(tmp_path / "m.gguf", {**tensors, "output.weight": output}))
    assert not config["tie_word_embeddings"]
    np.testing.assert_array_equal(source.read("lm_head.weight").numpy(), output)


def test_what_is_no_part_of_the_decoder(tmp_path: Path, tensors: Tensors) -> None:
    vision = {"v.patch_embd.weight": np.ones((4, 4), np.float32)}
    _, source, _, _ = open_gguf(write(tmp_path / "vision.gguf", tensors | vision))
    assert all(name.startswith(("embed_tokens", "norm", "layers.")) for name in source.names())
    expert = {"blk.0.ffn_gate_exps.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(UnsupportedArchitecture, match="ffn_gate_exps"):
        open_gguf(write(tmp_path / "experts.gguf", tensors | expert))


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba'; known are llama, llama-embed, qwen2"):
        open_gguf(write(tmp_path / "m.gguf", tensors, "mamba"))


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path, tensors: Tensors) -> None:
    fewer = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, blk\.1\.ffn_up\.weight"):
        open_gguf(write(tmp_path / "fewer.gguf", fewer | {"blk.1.ffn_up.bias": np.ones(WIDE, np.float32)}))
    other = tensors | {"blk.1.ffn_up.weight": np.ones((WIDE, HIDDEN + 32), np.float32)}
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight' has shape \(96, 96\), not \(96, 64\)"):
        open_gguf(write(tmp_path / "other.gguf", other))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"PK\x03\x04" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 0x1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "little-endian versions 2 and 3"),
        (lambda data: data[:8] + struct.pack("<Q", 2**63) + data[16:], f"announces {2**63} tensors"),
        (lambda data: data[:16] + struct.pack("<Q", 2**40) + data[24:], "announces 1099511627776 fields"),
        (lambda data: data[:24] + struct.pack("<Q", 2**64 - 1) + data[32:], "cut short"),
        (lambda data: data[:1000], "cut short|cannot hold"),
        (lambda data: data[:-64], "cut short, tensor .* ends at byte"),
        (lambda data: data.replace(b"general.arch", b"\xff\xfeneral.arch"), "not UTF-8"),
        (lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "is there twice"),
        (lambda data: with_kind(data, b"blk.1.ffn_up.weight", 2, 99), "has type 99"),
        # A format of intermediate results, and integers: sizes are known, floats cannot be made.
        (lambda data: with_kind(data, b"blk.1.ffn_up.weight", 2, 15), "has type 15"),
        (lambda data: with_kind(data, b"blk.1.ffn_up.weight", 2, 24), "has type 24"),
        # Q4_K needs rows of 256.
        (lambda data: with_kind(data, b"blk.1.ffn_up.weight", 2, 12), "not made of blocks of 256"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(
    tmp_path: Path, sound: bytes, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(sound))
    with pytest.raises(CheckpointError, match=message) as raised:
        open_gguf(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def with_kind(data: bytes, name: bytes, dimensions: int, kind: int) -> bytes:
    at = data.index(name) + len(name) + 4 + 8 * dimensions
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 1))])
    with pytest.raises(CheckpointError):
        open_gguf(path)


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_header_bytes_give_a_model_or_a_refusal(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    header = sound.index(b"output_norm.weight") + 4000  # all fields, and most tensor infos
    flipped = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, header))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(flipped)
    try:
        _, source, tokenizer, _ = open_gguf(path)
    except CheckpointError:
        return
    for name in source.names():
        assert tuple(source.read(name).shape) == source.shape(name)
    tokenizer.text.encode("a b")


class TensorReader(gguf.GGUFReader):
    """The library's reader without the elements of lists: it makes a numpy array of each token, for ten seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        memory = self.data.data
        kind, count = struct.unpack_from("<IQ", memory, orig_offs)
        size = 12
        if kind in self.gguf_scalar_to_np:
            size += count * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        else:
            for _ in range(count):
                size += 8 + struct.unpack_from("<Q", memory, orig_offs + size)[0]
        return size, [], [], [gguf.GGUFValueType.ARRAY]


@pytest.mark.parametrize(
    ("name", "architecture", "names"),
    [
        (
            "smollm2-135m",
            "llama",
            {
                "token_embd.weight": "embed_tokens.weight",
                "blk.3.attn_q.weight": "layers.3.self_attn.q_proj.weight",
                "blk.3.attn_k.weight": "layers.3.self_attn.k_proj.weight",
                "blk.3.ffn_down.weight": "layers.3.mlp.down_proj.weight",
                "blk.29.ffn_norm.weight": "layers.29.post_attention_layernorm.weight",
            },
        ),
        (
            "gemma-3-270m",
            "gemma3",
            {
                "blk.2.attn_q.weight": "layers.2.self_attn.q_proj.weight",
                "blk.2.attn_v.weight": "layers.2.self_attn.v_proj.weight",
                "blk.2.attn_k_norm.weight": "layers.2.self_attn.k_norm.weight",
                "blk.2.ffn_norm.weight": "layers.2.pre_feedforward_layernorm.weight",
                "blk.2.post_ffw_norm.weight": "layers.2.post_feedforward_layernorm.weight",
                "output_norm.weight": "norm.weight",
            },
        ),
    ],
)
def test_real_weights_are_those_that_transformers_reads(
    real_model: Callable[[str], Path], name: str, architecture: str, names: dict[str, str]
) -> None:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    config, source, _, _ = open_gguf(real_model(name))
    undo = TENSOR_PROCESSORS[architecture](config)
    stored = {tensor.name: tensor for tensor in TensorReader(real_model(name)).tensors}
    for gguf_name, hub_name in names.items():
        plain = dequantize(stored[gguf_name].data, stored[gguf_name].tensor_type)
        expected = undo.process(weights=plain, name=gguf_name).weights
        np.testing.assert_array_equal(source.read(hub_name).numpy(), expected, err_msg=hub_name)


def test_a_large_vocabulary_is_read_without_a_call_per_token(real_model: Callable[[str], Path]) -> None:
    path, calls = real_model("gemma-3-270m"), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    earlier = sys.getprofile()
    sys.setprofile(count)
    try:
        header = reader._read_header(path)
    finally:
        sys.setprofile(earlier)
    tokens = len(header.fields["tokenizer.ggml.tokens"])
    assert tokens == 262144 and calls < tokens / 10
