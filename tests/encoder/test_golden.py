"""The published reference implementation's vectors, reproduced in reference mode."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder

TINY = ("tiny_llama", "tiny_llama2_chat", "tiny_llama3_instruct", "tiny_mistral_instruct", "tiny_gemma")


def encode_pairs(encoder: Encoder, pairs: list[list[str]]) -> np.ndarray:
    """Vectors of [instruction, text] pairs, in order."""
    by_instruction: dict[str, list[int]] = defaultdict(list)
    for position, (instruction, _) in enumerate(pairs):
        by_instruction[instruction].append(position)
    vectors = np.empty((len(pairs), encoder.dim), dtype=np.float32)
    for instruction, positions in by_instruction.items():
        vectors[positions] = encoder.encode([pairs[i][1] for i in positions], instruction=instruction)
    return vectors


def assert_reproduced(ours: np.ndarray, golden: np.ndarray, tolerance: float) -> None:
    """Cosine of every vector, and the largest difference over the golden root mean square."""
    a, b = ours.astype(np.float64), golden.astype(np.float64)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.999999
    assert np.abs(a - b).max() / np.sqrt((b**2).mean()) <= tolerance


def tiny_cases() -> list[tuple[str, str]]:
    folder = Path(__file__).parent.parent / "golden"
    return [(name, array) for name in TINY for array in np.load(folder / name / "golden.npz").files]


@pytest.mark.parametrize(("name", "array"), tiny_cases())
def test_tiny_models(golden_dir: Path, name: str, array: str) -> None:
    pooling, skip = array.split("__skip_")
    encoder = Encoder.load(
        golden_dir / name,
        compat="reference",
        pooling=pooling,
        skip_instruction={"True": True, "False": False}[skip],
        dtype="float32",
    )
    pairs = json.loads((golden_dir / name / "golden.json").read_text(encoding="utf-8"))["pairs"]
    assert_reproduced(encode_pairs(encoder, pairs), np.load(golden_dir / name / "golden.npz")[array], 1e-4)


@pytest.fixture(scope="module")
def smollm2(real_model) -> Encoder:
    return Encoder.load(real_model("smollm2-135m"), compat="reference", dtype="float32")


def test_smollm2_base(smollm2: Encoder, golden_dir: Path) -> None:
    described = json.loads((golden_dir / "smollm2_base.json").read_text(encoding="utf-8"))
    golden = np.load(golden_dir / "smollm2_base.npz")
    assert_reproduced(encode_pairs(smollm2, described["pairs"]), golden["emb"], 2e-3)
    assert_reproduced(encode_pairs(smollm2, described["long_pairs"]), golden["long"], 2e-3)


@pytest.mark.parametrize(
    ("adapters", "arrays"),
    [
        (["adapter_mntp"], ["mntp"]),
        (["adapter_mntp", "adapter_supervised"], ["supervised", "supervised_merged"]),
    ],
)
def test_smollm2_adapters(golden_dir: Path, real_model, adapters: list[str], arrays: list[str]) -> None:
    encoder = Encoder.load(
        real_model("smollm2-135m"),
        adapters=[golden_dir / name for name in adapters],
        compat="reference",
        dtype="float32",
    )
    described = json.loads((golden_dir / "smollm2_adapters.json").read_text(encoding="utf-8"))
    # The shortest third of the pairs shows wrong weights as well as all do; prompts and lengths are the test's above.
    lengths = [len(text) for _, text in described["pairs"]]
    shortest = sorted(range(len(lengths)), key=lambda index: lengths[index])[: len(lengths) // 3]
    vectors = encode_pairs(encoder, [described["pairs"][index] for index in shortest])
    golden = np.load(golden_dir / "smollm2_adapters.npz")
    for array in arrays:
        assert_reproduced(vectors, golden[array][shortest], 2e-3)
