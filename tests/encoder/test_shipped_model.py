"""Models that ship: their weights are in the package, their vectors are those they were measured with."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder
from unmask.catalogue import shipped_records
from unmask.catalogue.canary import expected_vector
from unmask.checkpoint import DEFAULT_MODEL
from unmask.checkpoint.shipped import SHIPPED

GOLDEN = Path(__file__).parent.parent / "golden" / "shipped_vectors.json"
# Normalised vectors' first eight numbers by model and text, as they were when the model was measured.
VECTORS: dict[str, dict[str, list[float]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
ENCODERS = {name: model for name, model in SHIPPED.items() if model.adapter or model.layers_folder}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder.load(request.param, dtype="float32")


def test_the_default_model_and_every_encoder_have_vectors_and_a_record() -> None:
    assert DEFAULT_MODEL in ENCODERS
    assert set(VECTORS) == set(ENCODERS) == {id for id, r in shipped_records().items() if r.owned_by == "unmask"}


def test_a_handful_of_vectors(encoder: Encoder) -> None:
    rows = VECTORS[encoder.checkpoint.name]
    vectors = encoder.encode(list(rows), normalize=True)
    np.testing.assert_allclose(vectors[:, :8], list(rows.values()), atol=2e-5)


def test_the_canary_in_the_record_is_its_own(encoder: Encoder) -> None:
    canary = shipped_records()[encoder.checkpoint.name].canary
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
    texts = [*VECTORS[DEFAULT_MODEL], "Someone plays an instrument.", "Where can I get a current account?"]
    texts.append("Chemistry with GNNs")
    whole, cut = (encoder.encode(texts, normalize=True, dimensions=size) for size in (None, 256))
    assert np.corrcoef((whole @ whole.T).ravel(), (cut @ cut.T).ravel())[0, 1] > 0.97


@pytest.mark.parametrize("name", ENCODERS)
def test_the_weights_say_what_they_were_trained_on_and_how(name: str) -> None:
    model = ENCODERS[name]
    if model.adapter:
        folder, key, file = model.adapter, "base_model_name_or_path", "adapter_config.json"
    else:
        assert model.layers_folder
        folder, key, file = model.layers_folder, "token_embedding_from", "config.json"
    base = json.loads((folder / file).read_text(encoding="utf-8"))[key]
    assert base in SHIPPED and base not in ENCODERS
    text = (folder / "run.json").read_text(encoding="utf-8")
    run = json.loads(text)
    assert run["recipe"]["steps"] and run["data"] and run["versions"]
    assert '"/' not in text and ":/" not in text  # no path of the machine it was trained on
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "licence" in card.lower()
    assert all(f"| {source['name']} |" in card for source in run["recipe"]["data"]) or model.adapter
