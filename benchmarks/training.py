"""A supervised training step on this machine: unmask against sentence-transformers' trainer.

Same weights, same rows, same LoRA, same loss (in-batch and hard negatives, temperature 0.05), AdamW in both, all in one
process and interleaved: each round lets every trainer go once through the same rows, in turn, so that a noisy machine
slows all of them alike. Reported are tokens per second (a text's tokens count once and padding not at all, so the
numerator is the same for all), and the median of the ratios of single rounds. The losses of an untrained step are
compared, so that nobody wins by computing something else.

    make bench-training
    make bench-training ARGS="--model path/to/model --batch 48 --steps 4 --rounds 5"
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from backends.models import WORDS
from encode import processor
from rich.console import Console
from rich.progress import track
from rich.table import Table
from turns import turns

from unmask import Encoder, __version__
from unmask.training.examples import Example
from unmask.training.mixture import Part, TextBatch
from unmask.training.model_folder import write_model
from unmask.training.objectives import objective_for
from unmask.training.recipe import ALL_LINEAR, Recipe
from unmask.training.training_model import TrainingModel

Rows = list[Example]
Turn = Callable[[Rows], tuple[float, float]]  # rows -> seconds, loss of the first step
TEMPERATURE, RANK, RATE = 0.05, 16, 1e-5
# Medians of anchor, positive and hard negative in natural language inference, in words; and of a longer text.
LENGTHS = {"nli": (16, 10, 10), "passages": (10, 90, 90)}


def triplets(count: int, medians: tuple[int, ...], longest: int) -> Rows:
    """Rows of three texts whose word counts are log-normal around the medians; no text occurs twice."""
    generator = np.random.default_rng(20_404_596)

    def text(median: int, number: int) -> str:
        length = int(np.clip(np.exp(generator.normal(np.log(median), 0.5)), 2, longest))
        return " ".join([*generator.choice(WORDS, length - 1), str(number)])

    return [
        Example(text(medians[0], 3 * i), text(medians[1], 3 * i + 1), (text(medians[2], 3 * i + 2),))
        for i in range(count)
    ]


def unmask_turn(options: argparse.Namespace, folder: Path, precision: str) -> Turn:
    """Return our step as `unmask train` does it: objective, clipping, AdamW, merging of the adapters."""
    recipe = msgspec.convert(
        {
            "base": str(folder),
            "objective": "supervised",
            "steps": 1,
            "max_length": options.max_length,
            "precision": precision,
            "device": "cpu",
            "lora": {"rank": RANK, "alpha": 2 * RANK, "dropout": 0.0},
            "batch": {"size": options.batch, "forward_tokens": options.forward_tokens},
            "contrastive": {"temperature": TEMPERATURE, "both_ways": False},
            "data": [{"name": "rows", "path": "rows", "query": "q", "positive": "p", "negatives": ["n"]}],
        },
        Recipe,
    )
    training_model = TrainingModel(recipe, torch.device("cpu"))
    objective = objective_for(recipe, training_model, None)
    parameters = list(training_model.parameters.values())

    def turn(rows: Rows) -> tuple[float, float]:
        adamw = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        training_model.decoder.train()
        losses = []
        began = time.perf_counter()
        for step, start in enumerate(range(0, len(rows), options.batch)):
            report = objective(TextBatch([Part(recipe.data[0], rows[start : start + options.batch])]), step)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            training_model.merge()
            losses.append(report.loss)
        return time.perf_counter() - began, losses[0]

    return turn


def sentence_transformers_turn(options: argparse.Namespace, folder: Path, bfloat16: bool, scratch: Path) -> Turn:
    """The peer's trainer as its documentation shows it: MultipleNegativesRankingLoss on a model with a PEFT adapter."""
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = options.max_length
    targets: list[str] = list(ALL_LINEAR)
    model.add_adapter(
        LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION, r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets
        )
    )

    class Clock(TrainerCallback):
        """Measures from the fetching of the first batch to the last update, without the setup of the trainer."""

        began = seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    def turn(rows: Rows) -> tuple[float, float]:
        columns = {
            "anchor": [row.query for row in rows],
            "positive": [row.positive for row in rows],
            "negative": [row.negatives[0] for row in rows],
        }
        clock = Clock()
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(scratch),
                max_steps=len(rows) // options.batch,
                per_device_train_batch_size=options.batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=bfloat16,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_steps=1,
                logging_first_step=True,
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
            callbacks=[clock],
        )
        trainer.train()
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        return clock.seconds, losses[0]

    return turn


def as_sentence_transformer(encoder: Encoder, folder: Path) -> None:
    """The encoder's own weights in the peer's layout: bidirectional by `is_causal`, the mean over all tokens."""
    write_model(folder, encoder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {"word_embedding_dimension": encoder.dim, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unmask/smollm2-135m")
    parser.add_argument("--lengths", choices=sorted(LENGTHS), default="nli")
    parser.add_argument("--batch", type=int, default=48, help="rows per step")
    parser.add_argument("--steps", type=int, default=3, help="per trainer and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=96, help="tokens per text")
    parser.add_argument("--forward-tokens", type=int, default=8192, help="ours: tokens of one forward")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="left out: both, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("bench-results/training.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    encoder = Encoder.load(options.model, max_length=options.max_length)
    rows = triplets(options.batch * options.steps, LENGTHS[options.lengths], options.max_length)
    tokens = int(np.minimum(encoder.count_tokens([t for row in rows for t in row.texts()]), options.max_length).sum())
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        as_sentence_transformer(encoder, scratch / "model")
        trainers: dict[str, Turn] = {}
        precisions = [options.precision] if options.precision else ["float32", "bfloat16"]
        for precision in precisions:
            trainers[f"unmask, {precision}"] = unmask_turn(options, scratch / "model", precision)
            peer = f"sentence-transformers, {'bf16=True' if precision == 'bfloat16' else precision}"
            trainers[peer] = sentence_transformers_turn(options, scratch / "model", precision == "bfloat16", scratch)
        warm_up = rows[: options.batch]
        losses: dict[str, float] = {}
        for name, turn in trainers.items():
            losses[name] = turn(warm_up)[1]
            gc.collect()
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for number in track(range(options.rounds), description="rounds"):
            for name, turn in turns(trainers.items(), number):
                seconds[name].append(turn(rows)[0])
                print(f"{name}: {tokens / seconds[name][-1]:.0f} tokens/s, loss {losses[name]:.4f}", flush=True)
                gc.collect()  # a trainer is a cycle that holds the last step's activations: gigabytes

    console = Console()
    faster = [f"our {precision} is faster by" for precision in precisions]
    table = Table("trainer", "tokens/s", "spread", *faster, "ratio per round", "loss")
    results: dict[str, Any] = {}
    for name, times in seconds.items():
        ratios = {
            precision: [own / mine for own, mine in zip(times, seconds[f"unmask, {precision}"], strict=True)]
            for precision in precisions
        }
        results[name] = {
            "tokens_per_second": tokens / statistics.median(times),
            "seconds": times,
            "unmask_faster_by": ratios,
            "first_loss": losses[name],
        }
        peer = not name.startswith("unmask")
        table.add_row(
            name,
            f"{tokens / statistics.median(times):.0f}",
            f"{tokens / max(times):.0f}-{tokens / min(times):.0f}",
            *(f"{statistics.median(ratios[p]):.2f}x" if peer else "" for p in precisions),
            " ".join(f"{ratio:.2f}" for ratio in ratios[precisions[0]]) if peer else "",
            f"{losses[name]:.4f}",
        )
    console.print(table)
    mix = f"{options.steps} steps of {options.batch} rows, {tokens} tokens, lengths as {options.lengths}"
    console.print(f"{options.model}; {mix}; {options.rounds} rounds; {options.threads} threads")
    report = {
        "model": options.model,
        "revision": encoder.checkpoint.revision,
        "mix": mix,
        "rounds": options.rounds,
        "threads": options.threads,
        "versions": {"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
