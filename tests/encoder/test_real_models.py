"""The four real models: they load, encode, and have transformers' hidden states."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask import Encoder
from unmask.encoder import Decoder, prepacked

TEXTS = [
    "how much protein should a female eat",
    "Definition of summit for English Language Learners: the highest point of a mountain.",
    "def add(a, b):\n    return a + b",
    "日本語の短い文です。",
]
DIMENSIONS = {"smollm2-135m": 576, "gemma-3-270m": 640, "tinyllama-1.1b": 2048, "qwen2.5-coder-1.5b": 1536}
# Layers by which the large models are compared: float32 makes four and six gigabytes of all. These few have every type
# that the file keeps tensors of a layer in, and opening it checks the name, shape and place of each tensor it holds.
LAYERS = {"tinyllama-1.1b": [0, 1, 21], "qwen2.5-coder-1.5b": [0, 1, 26]}


def transformers_twin(encoder: Encoder) -> torch.nn.Module:
    """transformers' own model over the very same memory: our fused parameters, cut where the hub's tensors end."""
    from transformers import AutoConfig, AutoModel

    values = {k: v for k, v in encoder.checkpoint.config.items() if k not in ("_name_or_path", "rope_factors")}
    config = AutoConfig.for_model(values.pop("model_type"), **values, is_causal=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="eager")
    decoder = encoder.trainable_decoder()
    assert isinstance(decoder, Decoder)
    ours = dict(decoder.named_parameters())
    state = {}
    for name, hub_names in decoder.sources().items():
        rows = [encoder.checkpoint.tensors.shape(hub_name)[0] for hub_name in hub_names]
        state.update(zip(hub_names, ours[name].detach().split(rows), strict=True))
    model.load_state_dict(state, strict=True, assign=True)
    # Rotary tables are no parameters; built on the meta device they are empty.
    model.rotary_emb = type(model.rotary_emb)(config=config)
    for embedding in (module for module in model.modules() if hasattr(module, "embed_scale")):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return model.eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def smollm2(real_model: Callable[[str], Path]) -> Encoder:
    return Encoder.load(real_model("smollm2-135m"), dtype="float32")


@pytest.mark.parametrize("name", DIMENSIONS)
@torch.no_grad()
def test_loads_encodes_and_matches_transformers(real_model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in LAYERS:
        # The large models are read from their own files each time: as a whole none of them is kept prepacked either.
        monkeypatch.setattr(prepacked, "_MAX_FILE_BYTES", 0)
    encoder = Encoder.load(real_model(name), dtype="float32", layers=LAYERS.get(name))
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (4, DIMENSIONS[name]) and np.isfinite(vectors).all()
    twin = transformers_twin(encoder)
    prompts = encoder.prompts.build(TEXTS)
    lengths = [len(prompt.ids) for prompt in prompts]
    together = encoder.trainable_decoder()(
        torch.from_numpy(np.concatenate([prompt.ids for prompt in prompts])), lengths
    )
    ids = [torch.from_numpy(prompt.ids)[None] for prompt in prompts]
    theirs = [twin(input_ids=one, use_cache=False).last_hidden_state[0] for one in ids]
    assert distance(together, torch.cat(theirs)) <= 1e-4
    # Text by text less is to be had: on the first one SmolLM2 and Qwen amplify rounding a thousandfold, and
    # transformers' own states move by 1e-4 with the number of threads or the place of its buffers in memory.
    for mine, other in zip(together.split(lengths), theirs, strict=True):
        assert distance(mine, other) <= 3e-4
    del twin, encoder
    gc.collect()


def test_a_text_has_one_vector_whatever_stands_beside_it(smollm2: Encoder) -> None:
    texts = [*TEXTS, *(f"{text} {n}" for n in range(1, 12) for text in TEXTS), "word " * 400]
    together = smollm2.encode(texts)
    for index in (0, 1, 2, 3, 20, len(texts) - 1):
        alone = smollm2.encode(texts[index])[0]
        np.testing.assert_array_equal(alone, together[index])


def test_order_str_normalize_dimensions(smollm2: Encoder) -> None:
    vectors = smollm2.encode(TEXTS)
    np.testing.assert_array_equal(smollm2.encode(TEXTS[::-1])[::-1], vectors)
    assert smollm2.encode(TEXTS[0]).shape == (1, 576)
    assert smollm2.encode([]).shape == (0, 576)
    unit = smollm2.encode(TEXTS, normalize=True, dimensions=64)
    assert unit.shape == (4, 64) and unit.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    cut = vectors[:, :64] / np.linalg.norm(vectors[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(unit, cut, rtol=0, atol=1e-5)
    instructed = smollm2.encode(TEXTS, instruction="Retrieve semantically similar text.")
    assert np.abs(instructed - vectors).max() > 1e-2


def test_lower_precision_stays_close(smollm2: Encoder, real_model: Callable[[str], Path]) -> None:
    exact = smollm2.encode(TEXTS, normalize=True)
    rounded = Encoder.load(real_model("smollm2-135m"), dtype="bfloat16").encode(TEXTS, normalize=True)
    cosine = (exact * rounded).sum(1)
    # The first text is one on which the untrained model amplifies rounding.
    assert rounded.dtype == np.float32 and np.median(cosine) > 0.999 and cosine.min() > 0.95
