"""`dtype="auto"`: near enough, fastest, measured once."""

from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder
from unmask.encoder import precision
from unmask.encoder.precision import MAX_DISTANCE, fastest_precision
from unmask.errors import UsageError


class Rounded:
    """An encoder whose vectors are off by a distance, 1 - cosine, for one text."""

    def __init__(self, distance: float) -> None:
        self.distance = distance

    def encode(self, texts: list[str], *, normalize: bool = False) -> np.ndarray:
        vectors = np.tile(np.array([1.0, 0.0]), (len(texts), 1))
        cosine = 1 - self.distance
        vectors[-1] = cosine, (1 - cosine**2) ** 0.5
        return vectors


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measured precisions, on a machine where bfloat16 takes 0.8 and int8 half of float32's time."""
    monkeypatch.setattr(precision, "home", lambda: tmp_path)
    shares = {0.9 * MAX_DISTANCE: (0.8, 0.8), 0.8 * MAX_DISTANCE: (1.0, 0.25), 0.7 * MAX_DISTANCE: (1.1, 1.0)}
    monkeypatch.setattr(precision, "_time_shares", lambda candidate, _: shares[candidate.distance])
    return []


def load_from(distances: dict[str, float], loads: list[str]):
    def load(dtype: str) -> Rounded:
        loads.append(dtype)
        if dtype not in distances:
            raise UsageError("this machine has no product for it")
        return Rounded(distances[dtype])

    return load


@pytest.mark.parametrize(
    ("bfloat16", "int8", "best"),
    [
        (0.9, 0.8, "int8"),  # the geometric mean of both speeds counts
        (0.9, 1.1, "bfloat16"),  # int8 is faster and too far off
        (1.1, 2.0, "float32"),
        (0.7, None, "float32"),  # near and slower, and refused
        (float("nan"), 0.8, "int8"),
    ],
)
def test_the_fastest_that_is_near_is_chosen_once(
    bfloat16: float, int8: float | None, best: str, machine: list[str]
) -> None:
    distances = {"float32": 0.0, "bfloat16": bfloat16 * MAX_DISTANCE}
    if int8 is not None:
        distances["int8"] = int8 * MAX_DISTANCE
    load = load_from(distances, machine)
    choice = fastest_precision("revision", "cpu", load)
    assert choice.dtype == best and "bfloat16: " in choice.reason and "int8: " in choice.reason
    assert machine == ["float32", "bfloat16", "int8"]
    assert fastest_precision("revision", "cpu", load) == choice and len(machine) == 3  # kept
    fastest_precision("another revision", "cpu", load)
    assert len(machine) == 6


def test_another_machine_and_a_damaged_file_are_measured_again(
    machine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_from({"float32": 0.0}, machine)
    fastest_precision("revision", "cpu", load)
    (file,) = (tmp_path / "precision").iterdir()
    file.write_text("{}")
    fastest_precision("revision", "cpu", load)
    assert len(machine) == 6
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    fastest_precision("revision", "cpu", load)
    assert len(machine) == 9


def test_a_home_that_cannot_be_written_only_costs_time(machine: list[str], tmp_path: Path) -> None:
    (tmp_path / "precision").write_text("a file in the place of the folder")
    assert fastest_precision("revision", "cpu", load_from({"float32": 0.0}, machine)).dtype == "float32"


def test_the_texts_are_64_different_ones() -> None:
    assert len(set(precision.texts())) == 64 and all(text.strip() for text in precision.texts())


def test_a_real_model_becomes_one_of_the_precisions(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "home", lambda: tmp_path)
    encoder = Encoder.load(golden_dir / "tiny_llama", dtype="auto")
    exact = Encoder.load(golden_dir / "tiny_llama")
    assert exact.dtype_choice.dtype == "float32"
    assert encoder.dtype_choice.dtype in ("float32", "bfloat16", "int8") and "of float32's time" in (
        encoder.dtype_choice.reason
    )
    texts = precision.texts()
    cosine = (encoder.encode(texts, normalize=True) * exact.encode(texts, normalize=True)).sum(axis=1)
    assert (1 - cosine).max() <= MAX_DISTANCE
    same = Encoder.load(golden_dir / "tiny_llama", dtype=encoder.dtype_choice.dtype)  # pyright: ignore[reportArgumentType]
    assert same.precision == encoder.precision
    assert np.array_equal(same.encode(texts), encoder.encode(texts))
