"""Tests of the target vectors of a distillation."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import texts_of, write_decoder
from unmask.encoder import Encoder
from unmask.errors import StorageError, UsageError
from unmask.training.distillation_settings import Distillation, Teacher
from unmask.training.head import ridge
from unmask.training.targets import Rotation, Targets, compute_vectors


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return str(write_decoder(tmp_path / "teacher"))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_single_teacher_is_its_unit_vectors(teacher: str, tmp_path: Path) -> None:
    texts = texts_of(20)
    targets = Targets(Distillation(teacher=teacher), texts, tmp_path / "t.npz")
    assert np.allclose(targets.encode(texts), unit(Encoder.load(teacher).encode(texts)), atol=1e-5)
    assert targets.dimensions == 32


def test_cosines_of_an_ensemble_are_the_weighted_mean_of_the_centred_teachers(teacher: str, tmp_path: Path) -> None:
    texts = texts_of(30)
    settings = Distillation(
        teachers=[Teacher(model=teacher, weight=3.0), Teacher(model=teacher, prompt="moon ", weight=1.0)]
    )
    targets = Targets(settings, texts, tmp_path / "t.npz").encode(texts)
    encoder = Encoder.load(teacher)
    plain, prompted = (unit(encoder.encode([prompt + text for text in texts])) for prompt in ("", "moon "))
    centred = [unit(each - each.mean(axis=0)) for each in (plain, prompted)]
    expected = (3 * centred[0] @ centred[0].T + centred[1] @ centred[1].T) / 4
    assert np.allclose(targets @ targets.T, expected, atol=1e-5)


def test_the_rotation_orders_the_target_and_is_fitted_once(teacher: str, tmp_path: Path) -> None:
    texts, file = texts_of(60), tmp_path / "t.npz"
    settings = Distillation(teachers=[Teacher(model=teacher)], dimensions=12)
    first = Targets(settings, texts, file)
    vectors = first.encode(texts)
    assert vectors.shape == (60, 12)
    variances = (vectors**2).mean(axis=0)
    assert list(variances) == sorted(variances, reverse=True)
    assert 0 < first.rotation.explained < 1
    again = Targets(settings, texts[:5], file)  # another sample: the stored fit counts
    assert np.array_equal(again.encode(texts), vectors)


def test_all_components_keep_every_cosine(teacher: str, tmp_path: Path) -> None:
    texts = texts_of(50)
    whole = Targets(Distillation(teachers=[Teacher(model=teacher)]), texts, tmp_path / "a.npz").encode(texts)
    rotated = Targets(Distillation(teachers=[Teacher(model=teacher)], dimensions=32), texts, tmp_path / "b.npz")
    assert np.allclose(rotated.encode(texts) @ rotated.encode(texts).T, whole @ whole.T, atol=1e-5)
    assert rotated.rotation.explained == pytest.approx(1.0)


def test_vectors_are_computed_once_for_each_prompt(teacher: str, tmp_path: Path) -> None:
    texts = texts_of(10)
    settings = Distillation(teachers=[Teacher(model=teacher), Teacher(model=teacher, prompt="moon ")])
    done: list[tuple[str, int, int]] = []
    for rank in range(2):  # the shares of two processes
        compute_vectors(settings, texts[rank::2], lambda *report: done.append(report))
    assert sum(count for _, count, _ in done) == 20
    targets = Targets(settings, texts, tmp_path / "t.npz")
    for _, vectors in targets._teachers:
        vectors.model.encode = None  # pyright: ignore[reportAttributeAccessIssue] - nothing may be computed again
    assert targets.encode(texts).shape == (10, 64)


def test_a_target_longer_than_the_teachers_is_refused(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dimensions = 33: the teachers have 32 numbers"):
        Targets(Distillation(teachers=[Teacher(model=teacher)], dimensions=33), texts_of(50), tmp_path / "t.npz")


def test_a_damaged_rotation_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK nothing")
    with pytest.raises(StorageError, match=r"t\.npz is damaged"):
        Rotation.load(tmp_path / "t.npz")


@given(seed=st.integers(0, 2**32 - 1), features=st.integers(1, 12), outputs=st.integers(1, 6))
def test_ridge_finds_an_affine_map(seed: int, features: int, outputs: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(200, features)) * 10.0 ** generator.integers(-2, 3, size=features)
    weight, bias = generator.normal(size=(outputs, features)), generator.normal(size=outputs)
    y = x @ weight.T + bias
    fitted_weight, fitted_bias = ridge(x, y, penalty=1e-6)
    assert np.allclose(x @ fitted_weight.T + fitted_bias, y, atol=1e-3 * np.abs(y).max())


def test_a_large_penalty_leaves_the_mean() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 4)), generator.normal(size=(50, 3))
    weight, bias = ridge(x, y, penalty=1e12)
    assert np.abs(weight).max() < 1e-6
    assert np.allclose(bias, y.mean(axis=0), atol=1e-5)
