"""Conformance: right vectors pass in their precision, and each fault gets the sentence that names it."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoint.layouts import HIDDEN_SIZE, LAYOUTS, write_layout
from unmask.conformance import (
    Answer,
    Finding,
    PrecisionClass,
    References,
    build_references,
    examine,
    full_run,
    light_distance,
    light_rows,
    read_references,
    store_references,
)
from unmask.conformance.canaries import canary_set_version
from unmask.conformance.references import FLOORS, distances
from unmask.conformance.unpublished_canaries import draw_prompts
from unmask.encoder import Encoder
from unmask.errors import CheckpointError


@pytest.fixture(scope="module")
def references(golden_dir: Path) -> References:
    return build_references(str(golden_dir / "tiny_llama"), model="tiny_llama", draw=random.Random(7))


@dataclass
class Stub:
    """Answers texts with rows of `vectors`, after `change` has had each request's vectors."""

    references: References
    vectors: np.ndarray
    change: Callable[[np.ndarray, Sequence[str]], Sequence[np.ndarray]] = lambda vectors, texts: list(vectors)
    requests: list[list[str]] = field(default_factory=list)

    async def __call__(self, texts: Sequence[str], instruction: str) -> Answer:
        self.requests.append(list(texts))
        unpublished = self.references.unpublished
        if texts[0] in unpublished.texts:
            right = unpublished.vectors[[unpublished.texts.index(text) for text in texts]]
            return Answer(self.change(right.copy(), texts), prompt_tokens=9 * len(texts))
        rows = {(canary.text, canary.instruction): row for row, canary in enumerate(self.references.canaries)}
        right = self.vectors[[rows[text, instruction] for text in texts]]
        return Answer(self.change(right.copy(), texts), prompt_tokens=7 * len(texts))

    def finding(self, declared: PrecisionClass = "float16", **limits: Any) -> Finding:
        return examine(
            self.references, asyncio.run(full_run(self, self.references, random.Random(3), **limits)), declared
        )


def test_the_set_has_every_group_and_a_stable_version(references: References) -> None:
    groups = [canary.group for canary in references.canaries]
    assert 50 <= len(groups) <= 70
    assert set(groups) == {
        "plain", "short", "case", "accents", "scripts", "whitespace", "control", "paragraphs", "instructions",
        "boundaries",
    }  # fmt: skip
    assert len({(c.text, c.instruction) for c in references.canaries}) == len(groups)
    assert references.num_tokens.sum() < 9000
    for canary, tokens in zip(references.canaries, references.num_tokens, strict=True):
        if canary.boundary:
            assert canary.boundary - 12 < tokens <= canary.boundary
    assert references.set_version == canary_set_version(references.canaries)
    assert canary_set_version(references.canaries[1:]) != references.set_version


def test_right_vectors_pass_whatever_their_length_and_the_size_of_requests(references: References) -> None:
    for scale, max_inputs in ((1.0, 2048), (37.5, 8), (1.0, 1)):
        stub = Stub(references, references.vectors * scale)
        finding = stub.finding(max_inputs=max_inputs)
        assert finding.passed and finding.precision == "exact" and not finding.fault, finding
        assert finding.worst < 1e-12 and finding.normalised == (scale == 1.0)
        assert max(map(len, stub.requests)) <= max_inputs


def test_a_provider_of_short_texts_is_asked_for_short_texts_only(references: References) -> None:
    stub = Stub(references, references.vectors)
    assert stub.finding(max_tokens=60).passed
    lengths = {c.text: n for c, n in zip(references.canaries, references.num_tokens, strict=True)}
    lengths |= zip(references.unpublished.texts, references.unpublished.num_tokens, strict=True)
    assert max(lengths[text] for request in stub.requests for text in request) <= 60


def rounded(references: References, worst: float) -> np.ndarray:
    """The right vectors with noise that makes every distance about `worst` and none larger."""
    noise = np.random.default_rng(5).normal(size=references.vectors.shape)
    noise -= (noise * references.vectors).sum(1, keepdims=True) * references.vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    share = np.linspace(0.1, 0.95, len(noise))[:, None] ** 9
    return (references.vectors + noise * np.sqrt(2 * worst * share)).astype(np.float32)


@pytest.mark.parametrize("precision", list(FLOORS))
def test_each_precision_is_told_and_passes_where_it_is_declared(
    references: References, precision: PrecisionClass
) -> None:
    classes = list(references.limits)
    vectors = rounded(references, references.limits[precision][0])
    finding = Stub(references, vectors).finding(precision)
    assert finding.passed and finding.precision == precision, finding
    for stricter in classes[: classes.index(precision)]:
        refused = Stub(references, vectors).finding(stricter)
        assert not refused.passed
        assert refused.fault == f"has a lower precision than declared ({stricter}): like {precision}"


def test_every_mistake_of_the_bank_gets_its_own_sentence(references: References) -> None:
    assert len(references.bank) >= 15
    for mistake in references.bank:
        finding = Stub(references, mistake.vectors * 3).finding()
        assert not finding.passed and finding.fault == mistake.fault


def test_a_mistake_in_a_lower_precision_is_still_named(references: References) -> None:
    by_fault = {mistake.fault: mistake for mistake in references.bank}
    for fault in ("keeps the causal mask", "pools the last token; the model pools the mean", "lower-cases texts"):
        vectors = by_fault[fault].vectors
        jitter = np.random.default_rng(3).normal(size=vectors.shape) * 2e-3
        assert Stub(references, vectors + jitter.astype(np.float32)).finding().fault == fault


def test_the_bank_agrees_with_transformers(references: References, golden_dir: Path) -> None:
    """The causal decoder of another library, pooled as the model pools, is found to be causal."""
    import torch
    from transformers import AutoModel

    peer = AutoModel.from_pretrained(golden_dir / "tiny_llama", dtype=torch.float32)
    encoder = Encoder.load(golden_dir / "tiny_llama")
    vectors = references.vectors.copy()
    for row in np.flatnonzero(references.num_tokens <= 40):
        canary = references.canaries[row]
        prompt = encoder.prompts.build([canary.text], canary.instruction)[0]
        with torch.inference_mode():
            states = peer(torch.from_numpy(prompt.ids)[None]).last_hidden_state[0]
        vectors[row] = states[prompt.pooled[0] : prompt.pooled[1]].mean(0).numpy()
    assert Stub(references, vectors).finding(max_tokens=40).fault == "keeps the causal mask"


def swapped(vectors: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
    return list(vectors[::-1]) if len(texts) > 4 else list(vectors)


def noisy() -> Callable[[np.ndarray, Sequence[str]], list[np.ndarray]]:
    draw = np.random.default_rng(1)
    return lambda vectors, texts: list(vectors + draw.normal(size=vectors.shape).astype(np.float32) * 2e-3)


def neighbourly(vectors: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
    long = max(map(len, texts)) > 200 and min(map(len, texts)) < 100
    return list(vectors + 0.2 * vectors.mean(0) if long and len(texts) < 20 else vectors)


def stateful() -> Callable[[np.ndarray, Sequence[str]], list[np.ndarray]]:
    state = {"seen": 0}

    def change(vectors: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
        state["seen"] += any(len(text) > 1000 for text in texts)
        return list(vectors + 0.05 * (state["seen"] > 1))

    return change


RESHAPED = {
    "rotates or mirrors the space: only inner products are right": lambda vectors, texts: list(
        np.roll(vectors, 7, axis=1)
    ),
    "returns the vectors of a request out of order": swapped,
    "cuts vectors to 32 numbers; the model's have 64": lambda vectors, texts: [v[:32] for v in vectors],
    "gives a vector of zeros": lambda vectors, texts: list(vectors * 0),
    "does not pool: gives 192 numbers, as many as 3 tokens have": lambda vectors, texts: [
        np.tile(v, 3) for v in vectors
    ],
    "gives vectors of different lengths, 63 to 64 numbers": lambda vectors, texts: [
        v[: 64 - (i == 1)] for i, v in enumerate(vectors)
    ],
    "gives numbers that are not finite, for 60 texts": lambda vectors, texts: list(np.full_like(vectors, np.nan)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", RESHAPED)
def test_faults_of_shape_and_order(references: References, sentence: str) -> None:
    finding = Stub(references, references.vectors, RESHAPED[sentence]).finding()
    assert not finding.passed and finding.fault == sentence


def test_noise_batch_and_state(references: References) -> None:
    noise = Stub(references, references.vectors, noisy()).finding("int8")
    assert noise.passed  # 64 numbers of noise 2e-3 are a distance of 1e-4, which int8 allows
    noise = Stub(references, references.vectors, noisy()).finding("float16")
    assert noise.fault.startswith("gives another vector each time it is asked for the same text")
    for change in (neighbourly, stateful()):
        batch = Stub(references, references.vectors, change).finding()
        assert batch.fault == "gives a text another vector depending on its neighbours or on what came before"


@pytest.mark.parametrize(("dtype", "name"), [("<f2", "float16"), ("<f8", "float64"), (">f4", "big-endian float32")])
def test_other_encodings_are_named(references: References, dtype: str, name: str) -> None:
    async def ask(texts: Sequence[str], instruction: str) -> Answer:
        answer = await Stub(references, references.vectors)(texts, instruction)
        raw = [vector.astype(dtype).tobytes() for vector in answer.vectors]
        return Answer([np.frombuffer(content, dtype="<f4") for content in raw], raw)

    finding = examine(references, asyncio.run(full_run(ask, references, random.Random(3))))
    assert finding.fault == f"encodes vectors as {name}; base64 must hold little-endian float32"


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ("scripts", "reads scripts other than Latin differently: its tokenizer is another one"),
        ("control", "reads control tokens in a user's text"),
        ("instructions", "handles the instruction or the prompt differently"),
    ],
)
def test_a_fault_outside_the_bank_is_named_by_the_group_it_shows_in(
    references: References, group: str, sentence: str
) -> None:
    vectors = references.vectors.copy()
    rows = [row for row, canary in enumerate(references.canaries) if canary.group == group]
    vectors[rows] = np.roll(vectors[rows], 5, axis=1)
    assert Stub(references, vectors).finding().fault == sentence


def test_a_length_outside_the_bank_is_found_by_the_boundary_pairs(references: References) -> None:
    vectors = references.vectors.copy()
    pairs = [row for row, c in enumerate(references.canaries) if c.boundary > 256]
    vectors[pairs[1]] = vectors[pairs[0]] = vectors[pairs[0]] + 0.2  # the tail of both is lost
    assert Stub(references, vectors).finding().fault == "cuts texts between 256 and 512 tokens"


def test_another_model(references: References) -> None:
    other = np.random.default_rng(2).normal(size=references.vectors.shape).astype(np.float32)
    assert Stub(references, other).finding().fault.startswith("is another model: mean cosine ")


def test_a_light_run_draws_texts_that_no_provider_can_know(references: References) -> None:
    draws = [light_rows(references, random.Random(seed)) for seed in range(400)]
    assert all(len(set(rows)) == 3 for rows in draws) and len({row for rows in draws for row in rows}) == 256
    rows, right = draws[0], references.unpublished.vectors
    assert light_distance(references, rows, right[rows] * 9) < 1e-9
    assert light_distance(references, rows, right[[*rows[1:], rows[0]]]) > 1e-2
    assert light_distance(references, rows, right[rows][:, :32]) == float("inf")
    assert light_distance(references, rows, right[rows] * np.nan) == float("inf")
    shortest = int(references.unpublished.num_tokens.argmin())
    assert light_rows(references, random.Random(1), max_tokens=1) == [shortest]


def test_unpublished_texts_are_other_ones_on_each_machine(references: References, golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    drawn = [tuple(draw_prompts(encoder, random.SystemRandom())) for _ in range(2)]
    published = {canary.text for canary in references.canaries}
    assert len({*drawn[0], *drawn[1], *references.unpublished.texts}) > 2.9 * 256
    assert not published & {*drawn[0], *references.unpublished.texts}
    assert references.unpublished.num_tokens.max() <= 200
    some = list(references.unpublished.texts[:8])
    right = encoder.encode(some, normalize=True)
    np.testing.assert_allclose(references.unpublished.vectors[:8], right, atol=1e-6)


def test_a_provider_that_knows_the_published_canaries_by_heart_is_refused(references: References) -> None:
    """It answers every published text rightly and gives any other one a vector of its own."""
    published = {canary.text for canary in references.canaries}

    def change(vectors: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
        return [v if text in published else np.roll(v, 1) for v, text in zip(vectors, texts, strict=True)]

    finding = Stub(references, references.vectors, change).finding()
    assert (finding.passed, finding.worst < 1e-9) == (False, True)
    assert finding.fault == "answers published canary texts rightly and other texts wrongly"
    short = Stub(references, references.vectors, lambda vectors, texts: [
        v if text in published else v[:32] for v, text in zip(vectors, texts, strict=True)
    ])  # fmt: skip
    assert short.finding().fault == finding.fault


def test_distances_are_exact_near_zero() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    b = np.array([[6.0, 8.0], [0.0, 2.0], [1.0, 1e-6]])
    np.testing.assert_allclose(distances(a, b), [0.0, 1.0, 5e-13], rtol=1e-6, atol=1e-16)


def test_references_survive_their_file(references: References, tmp_path: Path) -> None:
    file = tmp_path / "some" / "references.npz"
    store_references(references, file)
    again = read_references(file)
    assert again.canaries == references.canaries and again.limits == references.limits
    assert [mistake.fault for mistake in again.bank] == [mistake.fault for mistake in references.bank]
    np.testing.assert_array_equal(again.vectors, references.vectors)
    np.testing.assert_array_equal(again.unpublished.vectors, references.unpublished.vectors)
    assert again.unpublished.texts == references.unpublished.texts and file.stat().st_mode & 0o077 == 0
    assert Stub(again, references.bank[0].vectors).finding().fault == references.bank[0].fault
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="Delete it to compute them again"):
        read_references(file)


def test_a_template_and_adapters_left_out_are_in_the_bank(golden_dir: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "base").symlink_to(golden_dir / "tiny_llama3_instruct")  # where an adapter's base is looked for
    config = {"base_model_name_or_path": "base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj"], "layers_to_transform": [1]})
    )
    size = json.loads((golden_dir / "tiny_llama3_instruct" / "config.json").read_text())["hidden_size"]
    draw = np.random.default_rng(8)
    name = "base_model.model.layers.1.self_attn.q_proj"
    weights = {
        f"{name}.lora_A.weight": draw.normal(size=(4, size)).astype(np.float32),
        f"{name}.lora_B.weight": draw.normal(size=(size, 4)).astype(np.float32),
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    adapted = build_references(str(adapter), model="adapted")
    faults = [mistake.fault for mistake in adapted.bank]
    assert "leaves out the chat template" in faults and "leaves out adapter 1 of 1 (adapter)" in faults
    for mistake in adapted.bank:
        assert Stub(adapted, mistake.vectors).finding().fault == mistake.fault


@pytest.mark.parametrize("form", ["all tokens are pooled", "BOS is not pooled"])
def test_a_model_that_pools_its_first_token_has_a_bank(form: str, copied, tmp_path: Path) -> None:
    if form == "BOS is not pooled":
        folder = copied("tiny_llama")
        (folder / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "first_token"}))
    else:
        pooling = {"word_embedding_dimension": HIDDEN_SIZE, "pooling_mode_cls_token": True}
        layout = LAYOUTS["nvidia/llama-embed-nemotron-8b"]
        folder = write_layout(tmp_path / "model", replace(layout, pooling=pooling))
    bank = build_references(str(folder), model="first")
    poolings = {mistake.fault: mistake for mistake in bank.bank if "; the model pools" in mistake.fault}
    others = {"the mean", "the weighted mean", "the last token"}
    others |= {"the first token"} if form == "BOS is not pooled" else set()
    assert set(poolings) == {f"pools {other}; the model pools the first token of the text" for other in others}
    for mistake in poolings.values():
        assert Stub(bank, mistake.vectors).finding().fault == mistake.fault


def test_the_first_token_of_the_text_is_a_mistake_of_its_own(references: References) -> None:
    assert "pools the first token of the text; the model pools the mean" in [x.fault for x in references.bank]
