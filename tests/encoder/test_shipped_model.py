"""The model that ships: its adapter is in the package, its vectors are those it was measured with."""

import base64
import json

import numpy as np
import pytest

from unmask import Encoder
from unmask.catalogue import shipped_records
from unmask.catalogue.canary import expected_vector
from unmask.checkpoint import DEFAULT_MODEL
from unmask.checkpoint.shipped import SHIPPED

# Normalised vectors' first eight numbers, as they were when the model was measured.
VECTORS = {
    "How do I open a bank account?": [
        -0.028172,
        0.008819,
        0.079896,
        -0.008422,
        -0.006214,
        0.025795,
        -0.087390,
        0.051832,
    ],
    "A man is playing a guitar.": [-0.007392, 0.043013, -0.000089, -0.044988, -0.069154, -0.004439, 0.010125, 0.056881],
    "Graph neural networks for molecules": [
        -0.022728,
        -0.027208,
        0.011900,
        0.001282,
        0.012530,
        -0.057274,
        -0.003187,
        0.000965,
    ],
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(DEFAULT_MODEL, dtype="float32")


@pytest.mark.parametrize("text", VECTORS)
def test_a_handful_of_vectors(encoder: Encoder, text: str) -> None:
    vector = encoder.encode(text, normalize=True)[0]
    np.testing.assert_allclose(vector[:8], VECTORS[text], atol=2e-5)


def test_the_canary_in_the_record_is_its_own(encoder: Encoder) -> None:
    canary = shipped_records()[DEFAULT_MODEL].canary
    assert canary is not None
    assert len(base64.b64decode(canary.vector)) == 2 * encoder.dim
    assert float(encoder.encode(canary.text, normalize=True)[0] @ expected_vector(canary)) > 0.9999


def test_what_means_the_same_is_nearer_than_what_looks_the_same(encoder: Encoder) -> None:
    anchor, same, other = encoder.encode(
        ["The bank refused my card.", "My payment was declined.", "The river bank refused to hold the flood."],
        normalize=True,
    )
    assert anchor @ same > anchor @ other


def test_half_of_the_numbers_say_nearly_the_same(encoder: Encoder) -> None:
    texts = [*VECTORS, "Someone plays an instrument.", "Where can I get a current account?", "Chemistry with GNNs"]
    whole, cut = (encoder.encode(texts, normalize=True, dimensions=size) for size in (None, 256))
    assert np.corrcoef((whole @ whole.T).ravel(), (cut @ cut.T).ravel())[0, 1] > 0.97


def test_the_adapter_says_what_it_was_trained_on_and_how() -> None:
    folder = SHIPPED[DEFAULT_MODEL].adapter
    assert folder is not None
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] in SHIPPED and SHIPPED[config["base_model_name_or_path"]].adapter is None
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["recipe"]["steps"] and run["data"] and run["versions"]
    assert "Licence" in (folder / "README.md").read_text(encoding="utf-8")
