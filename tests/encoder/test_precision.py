"""`dtype="auto"`: near enough, never slower, measured once."""

import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.encoder import encoder as encoder_module
from unmask.encoder import precision, precision_choices, prepacked
from unmask.encoder.precision import MAX_DISTANCE, load_fastest
from unmask.errors import CheckpointError, UsageError


class Rounded:
    """An encoder whose vectors are off by a distance, 1 - cosine, for one text."""

    num_parameters = 100_000_000
    bits_per_weight = 32

    def __init__(self, dtype: str, distance: float) -> None:
        self.dtype, self.distance = dtype, distance

    def encode(self, texts: list[str], *, normalize: bool = False) -> np.ndarray:
        vectors = np.tile(np.array([1.0, 0.0]), (len(texts), 1))
        cosine = 1 - self.distance
        vectors[-1] = cosine, (1 - cosine**2) ** 0.5
        return vectors


class Machine:
    """A machine on which a precision takes shares of float32's time: for many texts, and for one.

    Attributes:
        loads: the precisions that models were loaded in, in order.
    """

    def __init__(self) -> None:
        self.shares: dict[str, tuple[float, float]] = {}
        self.distances: dict[str, float] = {"float32": 0.0}
        self.loads: list[str] = []

    def has(self, dtype: str, together: float, alone: float, distance: float = 0.5 * MAX_DISTANCE) -> None:
        self.shares[dtype], self.distances[dtype] = (together, alone), distance

    def load(self, dtype: str) -> Rounded:
        self.loads.append(dtype)
        if dtype not in self.distances:
            raise UsageError("this machine has no product for it")
        return Rounded(dtype, self.distances[dtype])

    def chosen(self, identity: str = "revision", device: str = "meta") -> str:
        """The choice; a device that is no CPU has two candidates."""
        encoder, choice = load_fastest("model", identity, device, self.load)
        assert encoder.dtype == choice.dtype
        return choice.dtype


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(precision_choices, "home", lambda: tmp_path)
    monkeypatch.setattr(precision, "_time_shares", lambda candidate, _: made.shares[candidate.dtype])
    return made


@pytest.mark.parametrize(
    ("bfloat16", "float16", "best"),
    [
        ((0.8, 0.8), (0.5, 0.9), "float16"),  # the geometric mean of both speeds counts
        ((0.8, 0.8), (0.5, 0.5, 1.1 * MAX_DISTANCE), "bfloat16"),  # too far off
        ((1.04, 0.5), (1.03, 0.6), "float16"),  # more than 3 % slower for many texts
        ((0.5, 1.04), None, "float32"),  # and for one
        ((0.97, 0.97), None, "float32"),  # not worth other vectors
        ((0.5, 0.5, float("nan")), None, "float32"),
    ],
)
def test_the_rule(bfloat16: Any, float16: Any, best: str, machine: Machine) -> None:
    machine.has("bfloat16", *bfloat16)
    if float16 is not None:
        machine.has("float16", *float16)
    _, choice = load_fastest("model", "revision", "meta", machine.load)
    assert choice.dtype == best and "bfloat16: " in choice.reason and "float16: " in choice.reason


def test_a_choice_is_measured_once_for_a_model_and_a_machine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("bfloat16", 1.0, 0.6)
    assert machine.chosen(device="cpu") == "bfloat16"
    assert machine.loads == ["float32", "bfloat16"]  # int8 is too far off by its own tolerance
    machine.loads.clear()
    assert machine.chosen(device="cpu") == "bfloat16" and machine.loads == ["bfloat16"]
    (file,) = (tmp_path / "precision").glob("*.json")
    file.write_text("{}")
    machine.loads.clear()
    assert machine.chosen(device="cpu") == "bfloat16" and len(machine.loads) == 2  # a damaged file counts as none
    for change in ("another revision", "revision"):
        machine.loads.clear()
        machine.chosen(change, device="cpu")
        assert len(machine.loads) == (1 if change == "revision" else 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    machine.loads.clear()
    machine.chosen(device="cpu")
    assert len(machine.loads) == 2


def test_processes_that_start_together_measure_once(machine: Machine) -> None:
    machine.has("bfloat16", 1.0, 0.6)
    start, chosen = threading.Barrier(4), []

    def begin() -> None:
        start.wait()
        chosen.append(machine.chosen(device="cpu"))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["bfloat16"] * 4
    # One thread measured, and the three others loaded the precision that it chose: one load of bfloat16 each.
    assert machine.loads.count("bfloat16") == 4


def test_a_home_that_cannot_be_written_only_costs_time(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "precision").write_text("a file in the place of the folder")
    machine.has("bfloat16", 0.9, 0.6)
    assert machine.chosen(device="cpu") == machine.chosen(device="cpu") == "bfloat16"
    assert machine.loads == ["float32", "bfloat16"] * 2


@pytest.mark.parametrize(("attribute", "value"), [("num_parameters", 100_000), ("bits_per_weight", 8)])
def test_nothing_is_measured_where_nothing_can_be_gained(
    attribute: str, value: int, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rounded, attribute, value)
    monkeypatch.setattr(precision.kernels, "has_amx", lambda: False)
    encoder, choice = load_fastest("model", "revision", "cpu", machine.load)
    assert encoder.dtype == choice.dtype == "float32" and f"{value:,}" in choice.reason
    assert machine.loads == ["float32"] and not list(tmp_path.iterdir())


def test_files_that_are_replaced_during_the_measurement_are_not_kept_under_the_old_revision(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (precision_choices, prepacked):
        monkeypatch.setattr(module, "home", lambda: tmp_path / "home")
    for module in (precision, prepacked):
        monkeypatch.setattr(module, "_FEW_WEIGHTS", 1000)
    model, measure = tmp_path / "model", precision._measure
    shutil.copytree(golden_dir / "tiny_llama", model)
    [weights] = model.glob("*.safetensors")
    before = {folder: Encoder.load(folder, dtype="float32") for folder in (golden_dir / "tiny_llama", model)}

    def replace(*arguments: Any) -> Any:
        newer = {name: tensor + torch.full_like(tensor, 0.1) for name, tensor in load_file(weights).items()}
        save_file(newer, tmp_path / "newer.safetensors")
        (tmp_path / "newer.safetensors").replace(weights)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(precision, "_measure", replace)
        with pytest.raises(CheckpointError, match="model: its files have changed while they were read; load it again"):
            Encoder.load(model)
    assert not list((tmp_path / "home").glob("precision/*.json"))
    old, new = Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16"), Encoder.load(model, dtype="bfloat16")
    assert old.checkpoint.revision == before[model].checkpoint.revision != new.checkpoint.revision
    texts = precision.texts()[:4]
    right = before[golden_dir / "tiny_llama"].encode(texts, normalize=True)
    assert ((old.encode(texts, normalize=True) * right).sum(axis=1) > 0.999).all()
    assert not np.allclose(new.encode(texts, normalize=True), right, atol=0.01)


def test_the_texts_are_64_different_ones() -> None:
    assert len(set(precision.texts())) == 64 and all(text.strip() for text in precision.texts())


def test_a_real_model_becomes_one_of_the_precisions(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_choices, "home", lambda: tmp_path)
    monkeypatch.setattr(precision, "_FEW_WEIGHTS", 1000)
    opened = Mock(wraps=open_checkpoint)
    monkeypatch.setattr(encoder_module, "open_checkpoint", opened)
    encoder = Encoder.load(golden_dir / "tiny_llama")
    assert opened.call_count == 1  # one for all precisions: its tokenizer alone takes a quarter of a second
    exact = Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    assert exact.dtype_choice.dtype == "float32" and exact.bits_per_weight == 32
    assert encoder.dtype_choice.dtype in ("float32", "bfloat16") and "bfloat16: " in encoder.dtype_choice.reason
    texts = precision.texts()
    cosine = (encoder.encode(texts, normalize=True) * exact.encode(texts, normalize=True)).sum(axis=1)
    assert (1 - cosine).max() <= MAX_DISTANCE
    same = Encoder.load(golden_dir / "tiny_llama", dtype=encoder.dtype_choice.dtype)  # pyright: ignore[reportArgumentType]
    assert same.precision == encoder.precision
    assert np.array_equal(same.encode(texts), encoder.encode(texts))
