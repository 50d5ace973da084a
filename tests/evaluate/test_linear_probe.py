"""The probe finds the optimum of multinomial logistic regression."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from unmask.evaluate.linear_probe import PENALTY_WORDS, fit_probe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run with one thread, as a task runs its probes: threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(n: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return correlated states of very unequal scales, and labels of very unequal frequency."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.4, n) - 1, classes - 1)
    states = (
        random.normal(size=(n, width)) @ random.normal(size=(width, width))
        + random.normal(size=(classes, width))[labels]
    )
    return (states * 10.0 ** random.uniform(-2, 1, width) + 3).astype(np.float32), labels.astype(np.int64)


def test_agrees_with_scikit_learn() -> None:
    states, labels = words(12_000, 12, 6, seed=0)  # more than one piece
    ours = fit_probe(states[:9_000], labels[:9_000], 6)(states[9_000:])
    standardised = (states - states[:9_000].mean(0)) / states[:9_000].std(0)
    theirs = LogisticRegression(C=1 / PENALTY_WORDS, max_iter=2000, tol=1e-8)
    theirs.fit(standardised[:9_000], labels[:9_000])
    expected = np.asarray(theirs.predict(standardised[9_000:]))
    assert np.mean(ours == expected) > 0.995
    assert abs(np.mean(ours == labels[9_000:]) - np.mean(expected == labels[9_000:])) < 1e-3


def test_same_words_same_probe() -> None:
    states, labels = words(3000, 16, 5, seed=1)
    predicted = fit_probe(states, labels, 5)(states)
    np.testing.assert_array_equal(fit_probe(states, labels, 5)(states), predicted)
    assert (fit_probe(states.astype(np.float16), labels, 5)(states) == predicted).mean() > 0.99


def test_a_label_that_never_occurs_is_never_predicted() -> None:
    states, labels = words(500, 8, 3, seed=2)
    predicted = fit_probe(states, labels, 40)(states)
    assert set(predicted) <= set(labels)


@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_constant_states_give_the_commonest_label(constant: float) -> None:
    predict = fit_probe(np.full((10, 4), constant, dtype=np.float16), np.array([1] * 6 + [0] * 4), 3)
    np.testing.assert_array_equal(predict(np.full((2, 4), constant, dtype=np.float16)), [1, 1])
    assert predict(np.empty((0, 4), dtype=np.float16)).shape == (0,)
