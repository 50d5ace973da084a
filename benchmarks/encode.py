"""Texts to vectors on this machine: unmask against transformers and sentence-transformers.

Same weights, same texts, same threads, same precision, all in one process and interleaved: each round times every
contender once, in turn, so that a noisy machine slows all of them alike. Reported are medians over rounds and the
median of the per-round ratios. Vectors are compared with ours in float32, so that nobody wins by being wrong; our own
8-bit products stand in a row of their own.

    make bench
    make bench ARGS="--model path/to/model --texts 128 --rounds 7"
    make bench ARGS="--dtype bfloat16"
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unmask import Encoder, __version__
from unmask.checkpoint import DEFAULT_MODEL

WORDS = (  # noqa: SIM905 - 64 quoted words read worse
    "the of and to in is was for on that with by as from at which this be are an it or not have but were their one "
    "all also after first time water people year world city system house market river paper music history light "
    "energy number question answer language science garden winter engine doctor theory measure surface evidence "
    "children machine station morning country general important different between against during without example"
).split()
Contender = Callable[[list[str]], np.ndarray]


def natural_texts(count: int, encoder: Encoder) -> list[str]:
    """Texts whose token counts are log-normal with median 30, cut at the model's maximum."""
    generator = np.random.default_rng(20_404_596)
    lengths = np.clip(np.exp(generator.normal(np.log(30), 1.0, count)).astype(int), 2, encoder.max_length - 4)
    return [" ".join(generator.choice(WORDS, length)) for length in lengths]


def as_hub_folder(encoder: Encoder, folder: Path) -> None:
    """Save the encoder's own weights and tokenizer the way transformers reads them."""
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    values = {key: value for key, value in encoder.checkpoint.config.items() if key != "_name_or_path"}
    config = AutoConfig.for_model(values.pop("model_type"), **values, is_causal=False)
    model = AutoModel.from_config(config)
    tensors = encoder.checkpoint.tensors
    model.load_state_dict({name: tensors.read(name) for name in model.state_dict()})
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder.checkpoint.tokenizer.text, pad_token="<|endoftext|>")
    tokenizer.model_max_length = encoder.max_length
    tokenizer.save_pretrained(folder)


def transformers_contender(folder: Path, dtype: torch.dtype) -> Contender:
    """Padded batches of 32, sorted by length, SDPA attention, mean over real tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()

    @torch.inference_mode()
    def run(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), 32):
            members = order[start : start + 32]
            batch = tokenizer([texts[i] for i in members], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"]
            hidden = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
            hidden = hidden.float() * mask[..., None]
            vectors[members] = (hidden.sum(1) / mask.sum(1, keepdim=True)).numpy()
        return vectors

    return run


def sentence_transformers_contender(folder: Path, dtype: torch.dtype) -> Contender:
    """As its users call it: `encode` with its own sorting and batches of 32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    return lambda texts: np.asarray(model.encode(texts, batch_size=32, show_progress_bar=False))


def gemm_peak(dtype: torch.dtype) -> dict[str, float]:
    """The best matrix product of the libraries at hand in this precision, in GFLOP/s, at shapes of this kind."""
    best: dict[str, float] = {}
    for rows, inner, columns in ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        products: dict[str, Callable[[], object]] = {"torch": partial(torch.mm, a, b, out=out)}
        if dtype == torch.float32:
            products["numpy"] = partial(np.dot, a.numpy(), b.numpy(), out=out.numpy())
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous(), rows)
            products["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
        for name, product in products.items():
            seconds = []
            for _ in range(12):
                began = time.perf_counter()
                product()
                seconds.append(time.perf_counter() - began)
            best[name] = max(best.get(name, 0.0), 2 * rows * inner * columns / min(seconds) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all but int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("bench-results/encode.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    encoder, dtype = Encoder.load(options.model, dtype=options.dtype), getattr(torch, options.dtype)
    texts = natural_texts(options.texts, encoder)
    counts = encoder.count_tokens(texts)
    tokens = int(counts.sum())
    with tempfile.TemporaryDirectory() as scratch:
        as_hub_folder(encoder, Path(scratch))
        contenders: dict[str, Contender] = {
            "unmask": encoder.encode,
            "unmask, int8": Encoder.load(options.model, dtype="int8").encode,
            "transformers, sorted, padded": transformers_contender(Path(scratch), dtype),
            "sentence-transformers": sentence_transformers_contender(Path(scratch), dtype),
        }
        exact = encoder if options.dtype == "float32" else Encoder.load(options.model)
        reference = exact.encode(texts)
        agreement = {name: cosine(run(texts), reference) for name, run in contenders.items()}  # and the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: list[dict[str, float]] = []
        for _ in track(range(options.rounds), description="rounds"):
            peaks.append(gemm_peak(dtype))
            for name, run in contenders.items():
                began = time.perf_counter()
                run(texts)
                seconds[name].append(time.perf_counter() - began)

    peak = statistics.median(max(peak.values()) for peak in peaks)
    shape = getattr(encoder.decoder, "shape", None)
    per_token = shape.flops_per_token / 1e9 if shape else float("nan")
    table = Table("contender", "tokens/s", "spread", "unmask is faster by", "of gemm peak", "cosine mean / worst")
    results = {}
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        ratios = [own / mine for own, mine in zip(times, seconds["unmask"], strict=True)]
        share = rate * per_token / peak
        results[name] = {
            "tokens_per_second": rate,
            "seconds": times,
            "ratio_per_round": ratios,
            "share_of_peak": share,
            "cosine_mean": agreement[name][0],
            "cosine_worst": agreement[name][1],
        }
        spread = f"{tokens / max(times):.0f}-{tokens / min(times):.0f}"
        faster = f"{statistics.median(ratios):.2f}x" if name != "unmask" else ""
        agreed = f"{agreement[name][0]:.6f} / {agreement[name][1]:.6f}"
        table.add_row(name, f"{rate:.0f}", spread, faster, f"{share:.0%}", agreed)
    mix = f"{len(texts)} texts, {tokens} tokens, median {int(np.median(counts))}, longest {counts.max()}"
    console = Console()
    console.print(table)
    console.print(f"{options.model}; {mix}; {options.threads} threads; {options.dtype}; gemm peak {peak:.0f} GFLOP/s")
    report = {
        "model": options.model,
        "revision": encoder.checkpoint.revision,
        "mix": mix,
        "rounds": options.rounds,
        "threads": options.threads,
        "dtype": options.dtype,
        "gemm_gflops": peaks,
        "gflop_per_token": per_token,
        "versions": {"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(f"written to {options.output}")


def cosine(vectors: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Mean and worst cosine, row by row."""
    products = (vectors * reference).sum(1)
    values = products / np.linalg.norm(vectors, axis=1) / np.linalg.norm(reference, axis=1)
    return float(values.mean()), float(values.min())


def processor() -> str:
    """The processor's own name for itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
