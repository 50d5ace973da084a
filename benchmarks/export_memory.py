"""Memory and time of exports of large models: a random decoder is written shard by shard and exported.

    python benchmarks/export_memory.py [--shape 7b] [--to hub:bfloat16] [--to gguf:q8] [--scratch FOLDER]

Each export runs in a process of its own, whose largest resident set must stay within 1.3 times the largest tensor in
float32 and 500 MB. 7b needs 13.5 GB of disk for the weights and as much for an export in 16 bits; all of it is removed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHARE, CONSTANT = 1.3, 500_000_000  # of the largest tensor, and bytes
SHAPES: Mapping[str, Mapping[str, int]] = {
    "7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "230m": {
        "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    },
}  # fmt: skip
_CHILD = """
import json, sys, time
from pathlib import Path
from unmask.export import ExportOptions, run_export
model, target, dtype, output = sys.argv[1:]
run_export(ExportOptions(model=model, target=target, output=Path(output), dtype=dtype, check=False), lambda line: None)
status = Path("/proc/self/status").read_text()
peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
print(json.dumps({"peak": peak, "processor_s": time.process_time()}))
"""


@dataclass(frozen=True)
class ExportCost:
    """Cost of one export.

    Attributes:
        peak: largest resident set of its process, bytes.
        bound: that it may have.
        written: bytes of the export.
        seconds, processor_s: wall time and processor time.
    """

    peak: int
    bound: int
    written: int
    seconds: float
    processor_s: float


def tensor_shapes(shape: Mapping[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of a Llama by name, those of one shard at a time."""
    hidden_size, between = shape["hidden_size"], shape["intermediate_size"]
    head_dim = hidden_size // shape["num_attention_heads"]
    rows = {
        "self_attn.q_proj": (hidden_size, hidden_size),
        "self_attn.k_proj": (shape["num_key_value_heads"] * head_dim, hidden_size),
        "self_attn.v_proj": (shape["num_key_value_heads"] * head_dim, hidden_size),
        "self_attn.o_proj": (hidden_size, hidden_size),
        "mlp.gate_proj": (between, hidden_size),
        "mlp.up_proj": (between, hidden_size),
        "mlp.down_proj": (hidden_size, between),
        "input_layernorm": (hidden_size,),
        "post_attention_layernorm": (hidden_size,),
    }
    yield {"embed_tokens.weight": (shape["vocab_size"], hidden_size), "norm.weight": (hidden_size,)}
    for layer in range(shape["num_hidden_layers"]):
        yield {f"layers.{layer}.{name}.weight": size for name, size in rows.items()}


def write_random_model(folder: Path, shape: Mapping[str, int]) -> Path:
    """Write a decoder with random bfloat16 weights, a shard in memory at a time.

    A million random numbers are repeated: drawing seven billion would take longer than the export.
    """
    folder.mkdir(parents=True)
    numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    places: dict[str, str] = {}
    for number, sizes in enumerate(tensor_shapes(shape)):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name, size in sizes.items():
            count = torch.Size(size).numel()
            tensors[name] = numbers.repeat(-(-count // len(numbers)))[:count].reshape(size)
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "architectures": ["LlamaModel"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "dtype": "bfloat16", **shape,
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    files: dict[str, Any] = {
        "config.json": config,
        "tokenizer_config.json": settings | {"pad_token": "<|endoftext|>"},
        "llm2vec_config.json": {"pooling_mode": "mean", "max_length": 512},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    """A byte-level tokenizer of GPT-2's kind with one merge: a GGUF file must have a list of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def measure_export(model: Path, shape: Mapping[str, int], target: str, dtype: str, output: Path) -> ExportCost:
    """Export a model in a process of its own, without a comparison of vectors, which would need the whole model.

    Raises:
        CalledProcessError: the export failed.
    """
    started = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, str(model), target, dtype, str(output)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    answer = json.loads(done.stdout)
    largest = max(torch.Size(size).numel() for sizes in tensor_shapes(shape) for size in sizes.values()) * 4
    return ExportCost(
        peak=answer["peak"],
        bound=int(SHARE * largest) + CONSTANT,
        written=sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        seconds=seconds,
        processor_s=answer["processor_s"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--to", action="append", metavar="FORMAT:DTYPE", help="default: hub:bfloat16 and gguf:q8")
    parser.add_argument("--scratch", help="folder for the weights and the exports")
    options = parser.parse_args(arguments)
    shape, is_within = SHAPES[options.shape], True
    print("| format | largest resident set | bound | written | seconds | processor time |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model = write_random_model(Path(scratch) / "model", shape)
        for name in options.to or ("hub:bfloat16", "gguf:q8"):
            target, _, dtype = name.partition(":")
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                cost = measure_export(model, shape, target, dtype, Path(folder) / "export")
            sizes = (f"{size / 1e6:,.0f} MB" for size in (cost.peak, cost.bound, cost.written))
            print(f"| {name} | {' | '.join(sizes)} | {cost.seconds:.0f} | {cost.processor_s:.0f} |", flush=True)
            is_within &= cost.peak <= cost.bound
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
