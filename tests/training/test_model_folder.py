"""A written model reads back the same: by `Encoder.load` to the bit, by transformers with the same ids and states."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.encoder.model.architectures import Rope
from unmask.errors import StorageError, UsageError
from unmask.training.merging import write_model
from unmask.training.recipe import Save

GOLDEN = ["tiny_gemma", "tiny_llama", "tiny_llama2_chat", "tiny_llama3_instruct", "tiny_mistral_instruct"]
TEXTS = ["an ordinary text", "x", "a longer one, with punctuation; numbers 1 2 3 and  two spaces"]


def assert_transformers_reads_it(folder: Path, encoder: Encoder) -> None:
    """The same ids with what goes around them, and the same states for the same ids."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), encoder.checkpoint.tokenizer
    for text in TEXTS:
        bare = ours.text.encode(text, add_special_tokens=False).ids
        assert theirs(text).input_ids == [*ours.prefix, *bare, *ours.suffix]
        assert theirs(text, add_special_tokens=False).input_ids == bare
    ids = torch.tensor(theirs(TEXTS[2]).input_ids)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = encoder.trainable_decoder()(ids, [len(ids)])
        got = model(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_written_and_read_again(golden_dir: Path, tmp_path: Path, name: str) -> None:
    encoder = Encoder.load(golden_dir / name, max_length=77)
    write_model(tmp_path / "model", encoder)
    again = Encoder.load(tmp_path / "model")
    assert again.max_length == 77
    for instruction in ("", "Find what answers it:"):
        expected = encoder.encode(TEXTS, instruction=instruction)
        np.testing.assert_array_equal(again.encode(TEXTS, instruction=instruction), expected)
    assert_transformers_reads_it(tmp_path / "model", encoder)


@pytest.mark.parametrize("name", ["tiny_llama2_chat", "tiny_llama3_instruct"])
def test_the_reference_mode_is_kept(golden_dir: Path, tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model", Encoder.load(golden_dir / name))
    expected, got = (
        Encoder.load(folder, compat="reference").encode(TEXTS, instruction="Find it:")
        for folder in (golden_dir / name, tmp_path / "model")
    )
    np.testing.assert_array_equal(got, expected)


def test_what_the_recipe_states_of_a_model_is_stored_with_it(golden_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama", max_length=20)
    save = Save(max_length=60, takes_instructions=False, matryoshka=[8, 32])
    write_model(tmp_path / "model", encoder, save=save)
    again = Encoder.load(tmp_path / "model")
    assert again.max_length == 60
    assert again.checkpoint.encoder_config["takes_instructions"] is False
    assert again.checkpoint.encoder_config["matryoshka"] == [32, 8]


def test_pooling_precision_and_the_causal_mask_are_kept(golden_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama", pooling="weighted_mean", skip_instruction=False, causal=True)
    write_model(tmp_path / "model", encoder)
    again = Encoder.load(tmp_path / "model", causal=True)
    np.testing.assert_array_equal(again.encode(TEXTS, instruction="Find:"), encoder.encode(TEXTS, instruction="Find:"))
    assert_transformers_reads_it(tmp_path / "model", encoder)
    write_model(tmp_path / "short", Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16"))
    assert open_checkpoint(tmp_path / "short").tensors.read("norm.weight").dtype == torch.bfloat16


def gguf_file(path: Path, *, own_head: bool = False, factors: torch.Tensor | None = None) -> Path:
    """A small Llama as llama.cpp's converter would lay it out, with a SentencePiece tokenizer that adds BOS and EOS."""
    generator = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "n", "▁a", "an"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-5.0, -3.0, -4.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * 5)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_eos_token(True)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 64), "output_norm": (64,)}
    for layer in range(2):
        block = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
        block |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    if own_head:
        shapes["output"] = (len(tokens), 64)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, np.float32) / 8)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_from_gguf_with_what_goes_around_a_text(tmp_path: Path) -> None:
    encoder = Encoder.load(gguf_file(tmp_path / "m.gguf"))
    assert encoder.checkpoint.tokenizer.prefix and encoder.checkpoint.tokenizer.suffix
    write_model(tmp_path / "model", encoder)
    np.testing.assert_array_equal(Encoder.load(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS))
    assert_transformers_reads_it(tmp_path / "model", encoder)
    pair = AutoTokenizer.from_pretrained(tmp_path / "model")("a", "an").input_ids
    assert pair[0] == 1 and pair[-1] == 2 and pair.count(1) == 2
    assert encoder.checkpoint.tokenizer.text.post_processor is None  # the encoder's own is as it was


def test_a_head_of_its_own_goes_along(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", own_head=True)
    encoder = Encoder.load(path)
    write_model(tmp_path / "model", encoder)
    head = open_checkpoint(path).tensors.read("lm_head.weight")
    assert torch.equal(open_checkpoint(tmp_path / "model").tensors.read("lm_head.weight"), head)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight, head)
    assert_transformers_reads_it(tmp_path / "model", encoder)


def test_llama3_positions_are_written_as_the_rule(tmp_path: Path) -> None:
    plain = Rope(500_000.0).frequencies(16)
    stretched = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192).frequencies(16)
    encoder = Encoder.load(gguf_file(tmp_path / "m.gguf", factors=plain / stretched))
    write_model(tmp_path / "model", encoder)
    np.testing.assert_allclose(Encoder.load(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert_transformers_reads_it(tmp_path / "model", encoder)


def test_whole_or_not_at_all(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="exists already"):
        write_model(tmp_path / "full", encoder)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unmask.training.model_folder.write_tokenizer", no_space)
    with pytest.raises(StorageError, match="No space left"):
        write_model(tmp_path / "model", encoder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full"]
