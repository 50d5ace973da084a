"""Tests of merging: end points, identities and exact sums; models that do not fit are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.adapter import Adapter
from unmask.errors import AdapterMismatch, UsageError
from unmask.training.adapter_products import Factors, compress, weighted_sum, write_factors
from unmask.training.merging import average, interpolate, merge_adapters, slerp, stack
from unmask.training.recipe import DataSource, Lora, Recipe
from unmask.training.run_folder import RunFolder, describe_run
from unmask.training.training_model import TrainingModel

TEXTS = ["an ordinary text", "x", "a longer one, with punctuation; and numbers 1 2 3"]
seeds = st.integers(0, 2**32 - 1)
weights = st.floats(0, 1)


def random_adapter(folder: Path, base: Path | str, rank: int, seed: int, targets: tuple[str, ...] = ("q_proj",)) -> str:
    """An adapter for tiny_llama's shapes with the products of `rank` random vectors."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": ("self_attn", 64, 64), "down_proj": ("mlp", 160, 64), "up_proj": ("mlp", 64, 160)}
    halves = {}
    for layer in range(3):
        for target in targets:
            block, inside, outside = sizes[target]
            a = torch.randn(rank, inside, generator=generator)
            b = 0.05 * torch.randn(outside, rank, generator=generator)
            halves[f"layers.{layer}.{block}.{target}"] = (a, b)
    write_factors(folder, Factors(folder.name, str(base), halves), {})
    return str(folder)


def weights_of(model: str | Path, adapters: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(model, adapters).tensors
    return {name: tensors.read(name).float() for name in tensors.names()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture
def base(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


def varied(base: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
    """Another model of the same architecture."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json" and not file.name.startswith("golden"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({name: change(name, t).contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return str(folder)


@settings(max_examples=60)
@given(seeds, weights)
def test_slerp_has_its_ends_and_lies_between(seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, 7, generator=generator)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, weight), a)
    torch.testing.assert_close(slerp(a, b, weight), slerp(b, a, 1 - weight), rtol=1e-4, atol=1e-5)
    x, y = a / a.norm(), b / b.norm()  # on the unit sphere it stays there, at a constant speed
    between = slerp(x, y, weight)
    assert between.norm() == pytest.approx(1, abs=1e-5)
    angle = torch.acos((x * y).sum().clamp(-1, 1))
    assert torch.acos((x * between).sum().clamp(-1, 1)).item() == pytest.approx(weight * angle.item(), abs=2e-3)


def test_slerp_of_what_has_no_angle_is_a_straight_line() -> None:
    a = torch.tensor([1.0, 2.0])
    assert torch.equal(slerp(a, torch.zeros(2), 0.25), torch.lerp(a, torch.zeros(2), 0.25))
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.isfinite(slerp(a, -a, 0.5)).all()


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_interpolation_has_the_ends(base: Path, tmp_path: Path, method: Literal["linear", "slerp"]) -> None:
    other = varied(base, tmp_path / "other", lambda _, t: t + 0.1 * torch.randn_like(t))
    for weight in (0.0, 0.5, 1.0):
        interpolate(str(base), other, weight, tmp_path / str(weight), method)
    assert_same(weights_of(tmp_path / "0.0"), weights_of(base), 0)
    assert_same(weights_of(tmp_path / "1.0"), weights_of(other), 0)
    half, ends = weights_of(tmp_path / "0.5"), (weights_of(base), weights_of(other))
    for name in half:
        between = torch.lerp if method == "linear" else slerp
        assert torch.equal(half[name], between(ends[0][name], ends[1][name], 0.5)), name


def test_an_adapters_name_is_enough_to_interpolate(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", base, 2, seed=1)
    interpolate(str(base), adapter, 0.5, tmp_path / "half")
    name = "layers.0.self_attn.q_proj.weight"
    expected = weights_of(base)[name] + Adapter(Path(adapter)).delta(name.removesuffix(".weight")) / 2
    torch.testing.assert_close(weights_of(tmp_path / "half")[name], expected, rtol=0, atol=1e-6)


@settings(max_examples=40)
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_a_weighted_sum_is_the_sum_of_products(seed: int, rank: int, other: int, factors: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        Factors(str(r), None, {"m": (torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator))})
        for r in (rank, other)
    ]
    a, b = weighted_sum(parts, factors).halves["m"]
    expected = sum(w * part.halves["m"][1] @ part.halves["m"][0] for w, part in zip(factors, parts, strict=True))
    torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-5)
    assert a.shape[0] == rank + other


@settings(max_examples=40)
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_compression_loses_what_it_says_and_no_more_than_it_must(seed: int, rank: int, rank_left: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)
    smaller, error = compress(Factors("x", None, {"m": (a, b)}), rank_left)
    whole, values = b @ a, torch.linalg.svdvals((b @ a).double())
    short_a, short_b = smaller.halves["m"]
    assert short_a.shape[0] == min(rank, rank_left)
    lost = float((whole - short_b @ short_a).norm() / whole.norm())
    assert lost == pytest.approx(error, abs=1e-5)
    assert error == pytest.approx(float(values[rank_left:].norm() / values.norm()), abs=1e-6)


def test_a_stack_is_what_merging_in_turn_gives(base: Path, tmp_path: Path) -> None:
    first = random_adapter(tmp_path / "first", base, 2, 1, ("q_proj", "up_proj"))
    second = random_adapter(tmp_path / "second", first, 3, 2, ("q_proj", "down_proj"))
    done = stack([first, second], tmp_path / "both")
    assert (done.rank, done.error) == (5, 0.0)
    assert_same(weights_of(base, (str(tmp_path / "both"),)), weights_of(base, (first, second)), 1e-6)
    # Its name finds the base, and PEFT reads it too, with its ranks that differ by module.
    assert_same(weights_of(tmp_path / "both"), weights_of(base, (first, second)), 1e-6)
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "both")).merge_and_unload()
    ours = weights_of(tmp_path / "both")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_order_of_a_stack_is_checked(base: Path, tmp_path: Path) -> None:
    first = random_adapter(tmp_path / "first", base, 2, 1)
    stranger = random_adapter(tmp_path / "stranger", "somebody/else", 2, 2)
    with pytest.raises(AdapterMismatch, match="somebody/else"):
        stack([first, stranger], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    with pytest.raises(UsageError, match="two adapters"):
        stack([first], tmp_path / "both")


def test_an_average_is_that_of_the_products(base: Path, tmp_path: Path) -> None:
    names = [random_adapter(tmp_path / str(seed), base, 2, seed) for seed in range(3)]
    done = average(names, tmp_path / "mean")
    assert done.rank == 6
    module = "layers.1.self_attn.q_proj"
    expected = sum(Adapter(Path(name)).delta(module) for name in names) / 3
    torch.testing.assert_close(Adapter(tmp_path / "mean").delta(module), expected, rtol=0, atol=1e-6)
    short = average(names, tmp_path / "short", rank=2)
    assert short.rank == 2
    assert 0.3 < short.error < 1  # three random directions do not fit in two
    with pytest.raises(UsageError, match="exists already"):
        average(names, tmp_path / "mean")


@pytest.mark.parametrize("rank", [None, 2])
def test_the_average_of_equals_is_what_they_are(base: Path, tmp_path: Path, rank: int | None) -> None:
    name = random_adapter(tmp_path / "one", base, 2, 5)
    done = average([name] * 3, tmp_path / "mean", rank=rank)
    assert done.error < 1e-6
    assert_same(weights_of(tmp_path / "mean"), weights_of(base, (name,)), 1e-6)


def test_the_average_of_whole_models(base: Path, tmp_path: Path) -> None:
    up = varied(base, tmp_path / "up", lambda _, t: t + 0.5)
    down = varied(base, tmp_path / "down", lambda _, t: t - 0.5)
    average([up, down], tmp_path / "mean")
    assert_same(weights_of(tmp_path / "mean"), weights_of(base), 1e-6)
    average([str(base)] * 3, tmp_path / "same")
    assert_same(weights_of(tmp_path / "same"), weights_of(base), 0)
    adapter = random_adapter(tmp_path / "adapter", base, 2, 1)
    with pytest.raises(UsageError, match="cannot be averaged with adapters"):
        average([adapter, up], tmp_path / "mixed")
    with pytest.raises(UsageError, match="--rank is for adapters"):
        average([up, down], tmp_path / "mixed", rank=4)


@pytest.mark.parametrize("fields", [{}, {"pooling": "last_token", "causal": True}], ids=["plain", "last token, causal"])
def test_the_checkpoints_of_a_run(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    recipe = Recipe(
        base=str(base),
        objective="mntp",
        data=[DataSource(name="x", path="x.txt", text="text")],
        steps=2,
        precision="float32",
        lora=Lora(rank=2, alpha=6.0, targets=["q_proj", "v_proj", "up_proj"]),
        **fields,
    )
    run = RunFolder(tmp_path / "run", keep=5)
    run.begin(describe_run(msgspec.to_builtins(recipe), {}, "none"), resume=False)
    training_model = TrainingModel(recipe, torch.device("cpu"))
    vectors = []
    for step in (1, 2):
        torch.manual_seed(step)
        for parameter in training_model.parameters.values():
            torch.nn.init.normal_(parameter, std=0.05)
        training_model.merge()
        training_model.decoder.eval()
        training_model.merge()
        vectors.append(training_model.encoder.encode(TEXTS))
        run.save(step, {"parameters": dict(training_model.parameters)})
    for step in (1, 2):
        one = str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        average([one, one], tmp_path / f"{step}")
        again = Encoder.load(tmp_path / f"{step}").encode(TEXTS)
        np.testing.assert_allclose(again, vectors[step - 1], rtol=1e-3, atol=1e-4)
    assert average([str(tmp_path / "run")], tmp_path / "mean").rank == 4
    module = "layers.0.mlp.up_proj"
    deltas = [Adapter(tmp_path / name).delta(module) for name in ("1", "2", "mean")]
    torch.testing.assert_close(deltas[2], (deltas[0] + deltas[1]) / 2, rtol=0, atol=1e-6)


def test_adapters_go_into_weights(base: Path, tmp_path: Path) -> None:
    first = random_adapter(tmp_path / "first", base, 2, 1, ("q_proj", "up_proj"))
    second = random_adapter(tmp_path / "second", first, 3, 2)
    merge_adapters(str(base), [first, second], tmp_path / "merged")
    assert_same(weights_of(tmp_path / "merged"), weights_of(base, (first, second)), 0)
    merge_adapters(second, [], tmp_path / "by name")
    assert_same(weights_of(tmp_path / "by name"), weights_of(base, (first, second)), 0)
    expected = Encoder.load(base, adapters=[first, second]).encode(TEXTS, instruction="Find it:")
    got = Encoder.load(tmp_path / "merged").encode(TEXTS, instruction="Find it:")
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_adapters(str(base), [], tmp_path / "none")
    merge_adapters(str(base), [first], tmp_path / "short", dtype="bfloat16")
    assert open_checkpoint(tmp_path / "short").tensors.read("norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: config | {"rope_theta": 5.0}, "different configurations"),
        (lambda config: config | {"model_type": "mistral"}, "llama and mistral"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    base: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    other = varied(base, tmp_path / "other", lambda _, t: t)
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    with pytest.raises(UsageError, match=message):
        interpolate(str(base), other, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tensor_that_does_not_fit_is_named(base: Path, golden_dir: Path, tmp_path: Path) -> None:
    narrow = varied(base, tmp_path / "narrow", lambda name, t: t[:-1] if name == "layers.1.mlp.up_proj.weight" else t)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight is \[160, 64\] in one and \[159, 64\]"):
        interpolate(str(base), narrow, 0.5, tmp_path / "out")
    with pytest.raises(UsageError, match="between"):
        interpolate(str(base), narrow, 1.5, tmp_path / "out")
    with pytest.raises(UsageError, match="different architectures"):
        average([str(base), str(golden_dir / "tiny_gemma")], tmp_path / "out")
    odd = tmp_path / "odd"
    write_factors(
        odd, Factors("odd", str(base), {"layers.0.self_attn.q_proj": (torch.ones(1, 3), torch.ones(2, 1))}), {}
    )
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.self_attn\.q_proj by a \(2, 3\) matrix"):
        average([random_adapter(tmp_path / "even", base, 1, 1), str(tmp_path / "odd")], tmp_path / "out")
