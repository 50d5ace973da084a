"""The two models that are measured, as folders that every backend reads or converts."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from backends import LONGEST
from unmask.checkpoint import open_checkpoint
from unmask.encoder.model.architectures import shape_of
from unmask.errors import UsageError
from unmask.training.model_folder import EncoderSettings, write_model_folder

WORDS = (  # noqa: SIM905 - 64 quoted words read worse
    "the of and to in is was for on that with by as from at which this be are an it or not have but were their one "
    "all also after first time water people year world city system house market river paper music history light "
    "energy number question answer language science garden winter engine doctor theory measure surface evidence "
    "children machine station morning country general important different between against during without example"
).split()

# https://huggingface.co/princeton-nlp/Sheared-LLaMA-1.3B/blob/main/config.json
SHEARED_LLAMA = {
    "architectures": ["LlamaModel"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "is_causal": False,
    "dtype": "bfloat16",
}
END = "<|endoftext|>"


MIXES = ("short", "natural", "long")


def texts_of(mix: str, count: int) -> list[str]:
    """Texts of about so many tokens: natural is log-normal with median 30, short 4 to 16, long as many as fit."""
    generator = np.random.default_rng(20_404_596)
    if mix == "short":
        lengths = generator.integers(4, 17, count)
    elif mix == "long":
        lengths = np.full(count, LONGEST)
    else:
        lengths = np.clip(np.exp(generator.normal(np.log(30), 1.0, count)).astype(int), 2, LONGEST - 4)
    return [" ".join(generator.choice(WORDS, length)) for length in lengths]


def write_real(model: str, folder: Path) -> str:
    """A model's own weights and tokenizer, in both directions; its revision.

    Raises:
        CheckpointError, ModelNotFound: see `open_checkpoint`.
        UsageError: its vectors are no means over all tokens, which is all that the peers are asked for.
    """
    checkpoint = open_checkpoint(model)
    settings = EncoderSettings.from_checkpoint(checkpoint)
    if settings.pooling != "mean":
        raise UsageError(f"{model} pools by {settings.pooling}; the comparison is written for mean")
    write_model_folder(folder, checkpoint, checkpoint.tensors, settings, torch.float32)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model_type"] == "llama":  # infinity-emb wants the class named, which files of one format do not do
        config.setdefault("architectures", SHEARED_LLAMA["architectures"])
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return checkpoint.revision


def write_random(config: Mapping[str, Any], folder: Path) -> str:
    """A Llama of any shape with random weights, kept in bfloat16, and a tokenizer of this benchmark's words."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(20_404_596)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in _shapes(config)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    # The same splitting as SmolLM2's, so that one statement in a GGUF file is true of both.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue] - a stub's gap
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": LONGEST}), encoding="utf-8"
    )
    return "random"


def gflop_per_token(folder: Path) -> float:
    """Cost of the linear layers."""
    shape = shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if shape is None:
        raise UsageError("the comparison is written for decoders in the table of architectures")
    return shape.flops_per_token / 1e9


def token_counts(folder: Path, texts: list[str]) -> np.ndarray:
    """Tokens of each text, cut at LONGEST."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return np.array([min(len(encoding.ids), LONGEST) for encoding in tokenizer.encode_batch(texts)])


def _shapes(config: Mapping[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "embed_tokens.weight", (config["vocab_size"], width)
    yield "norm.weight", (width,)
    for layer in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"layers.{layer}.{name}.weight", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"layers.{layer}.self_attn.{name}.weight", (width, width)
        for name in ("gate_proj", "up_proj"):
            yield f"layers.{layer}.mlp.{name}.weight", (inner, width)
        yield f"layers.{layer}.mlp.down_proj.weight", (width, inner)
