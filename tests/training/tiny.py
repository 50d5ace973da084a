"""Helpers for runs small enough for a test: decoders of two or three layers, a few dozen rows of data."""

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.decoder import Decoder
from unmask.errors import UnmaskError
from unmask.training import curves
from unmask.training.loop import TrainingProgress
from unmask.training.recipe import Recipe
from unmask.training.train import run_training
from unmask.training.training_model import TrainingModel

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")
WORDS = (
    "river", "stone", "bright", "quick", "lamp", "seven", "green", "table", "often",
    "sings", "under", "moon", "paper", "glass", "walks", "slow", "north",
)  # fmt: skip
DECODER: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 800,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def recipe_of(objective: str = "supervised", **fields: Any) -> Recipe:
    """A recipe over `pairs.tsv`, `texts.txt`; any field can be given, tables as dicts."""
    columns = {"query": "query", "positive": "positive", "negatives": ["negative"]}
    source = {"name": "pairs", "path": "pairs.tsv", **(columns if objective == "supervised" else {"text": "query"})}
    raw: dict[str, Any] = {
        "base": str(GOLDEN / "tiny_llama"),
        "objective": objective,
        "steps": 6,
        "max_length": 64,
        "precision": "float32",
        "device": "cpu",
        "data": [source],
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
        "optimiser": {"lr": 1e-2},
        "batch": {"size": 8},
    }
    return msgspec.convert({**raw, **fields}, Recipe)


def write_pairs(folder: Path, rows: int = 40) -> Path:
    """`pairs.tsv` with queries, positives and negatives of a few words."""
    chosen = random.Random(3)

    def text() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(2, 9)))

    lines = ["query\tpositive\tnegative", *("\t".join((text(), text(), text())) for _ in range(rows))]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_decoder(folder: Path, head: bool = False, **config: Any) -> Path:
    """A random decoder in the hub's layout, with the tokenizer of the golden models; biases and norms off neutral."""
    config = {**DECODER, **config}
    shape = shape_of(config)
    assert shape is not None
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "tiny_llama" / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(5)
    decoder = Decoder(shape)
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, torch.Tensor] = {}
    parameters = dict(decoder.named_parameters())
    for name, hub in decoder.sources().items():
        tensor = torch.randn(parameters[name].shape, generator=generator) * 0.15 + (1.0 if "norm" in name else 0.0)
        sizes = {3: [query, value, value], 2: [shape.intermediate_size] * 2}.get(len(hub), [len(tensor)])
        tensors.update((part, rows.contiguous()) for part, rows in zip(hub, tensor.split(sizes), strict=True))
    if head:
        tensors["lm_head.weight"] = torch.randn(shape.vocabulary, shape.hidden_size, generator=generator) * 0.15
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    """A copy of every gradient, after which there is none; parameters without one have zeros."""
    by_name = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()) for name, p in model.parameters.items()
    }
    for parameter in model.parameters.values():
        parameter.grad = None
    return by_name


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of tensors, relative to the second."""
    assert set(a) == set(b)
    over = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    under = sum(float(b[name].double().square().sum()) for name in b)
    return (over / under) ** 0.5


def off_start(model: TrainingModel, seed: int = 1) -> TrainingModel:
    """Move B away from zero, where half of the gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.parameters.items():
            if ".up." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.merge()
    return model


def run_recipe(
    recipe: Recipe,
    data: Path,
    output: Path,
    resume: bool = False,
    limits: Mapping[int, tuple[str, int]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """In a process of its own: train, and leave what went wrong in `<output>.error`.

    Args:
        limits: after which step to set which resource limit, as in `{3: ("RLIMIT_FSIZE", 20_000)}`. The limit of
            RLIMIT_AS is counted from what the process has by then.
    """
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    curves.draw_curves = lambda folder: None  # a second of work that has a test of its own

    def watch(progress: TrainingProgress) -> None:
        name, size = (limits or {}).get(progress.step, ("", 0))
        if name == "RLIMIT_AS":
            size += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if name:
            resource.setrlimit(getattr(resource, name), (size, size))

    try:
        run_training(recipe, data=data, output=output, resume=resume, progress=watch)
    except UnmaskError as error:
        Path(f"{output}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def kill_when(process: BaseProcess, ready: Callable[[], bool]) -> bool:
    """`kill -9` as soon as `ready`; False if the process had ended by then."""
    while process.is_alive() and not ready():
        time.sleep(0.003)
    if not process.is_alive() or process.pid is None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def steps_logged(output: Path) -> list[int]:
    """The steps in `metrics.jsonl`, as they stand there."""
    file = output / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


def texts_of(count: int, seed: int = 0, longest: int = 12) -> Sequence[str]:
    """Different texts of different lengths."""
    chosen = random.Random(seed)
    return [f"{number} " + " ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for number in range(count)]
