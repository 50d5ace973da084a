"""The CUDA runtime without a GPU: a tape of torch's operations takes the place of a CUDA graph.

A tape has the two properties of a CUDA graph that matter here: it repeats exactly the recorded operations, and it reads
and writes the same memory. Decisions that Python made while recording are frozen.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from unmask import Encoder
from unmask.encoder.model import attention
from unmask.encoder.pooling import POOLINGS, pool, pool_bags, pooling_bags
from unmask.encoder.runtime import cuda as cuda_runtime
from unmask.encoder.runtime.cuda import CudaRuntime, GraphSize, PackInputs, pack_buffer, pipelined_map
from unmask.errors import EmptyText

WORDS = ["river", "market", "winter", "stone", "the", "a", "of", "and", "letter", "morning"]
TEXTS = ["one", "two words", "three short words", "the river " * 9, "one", "a market in winter, and then " * 12]


@torch.library.custom_op("unmask_test::varlen", mutates_args=())
def varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, left: int, right: int, longest: int, scale: float
) -> Tensor:
    """Attention by cu_seqlens, in one operation of the tape. Rows behind the last sequence are NaN."""
    out = torch.full_like(query, torch.nan)
    group = query.shape[1] // key.shape[1]
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        assert end - start <= longest
        places = torch.arange(end - start)
        ahead = places[None, :] - places[:, None]
        hidden = (ahead < -left if left >= 0 else ahead < -end) | (ahead > right if right >= 0 else ahead > end)
        for head in range(query.shape[1]):
            scores = query[start:end, head].float() @ key[start:end, head // group].float().T * scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[start:end, head] = (weights @ value[start:end, head // group].float()).to(query.dtype)
    return out


class Tape(TorchDispatchMode):
    """Records torch's operations while it is active, and repeats them."""

    # Operations that read a number back from the GPU, or send one from Python, cannot be captured.
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique", "is_pinned")

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in self.FORBIDDEN):
            raise RuntimeError(f"{name} cannot be recorded")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def play(self, result: Tensor) -> None:
        """Repeat all operations and write the last result where the first one was."""
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, out in self.steps:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            befores = [out] if isinstance(out, Tensor) else list(out)
            afters = [again] if isinstance(again, Tensor) else list(again)
            made.update((id(before), after) for before, after in zip(befores, afters, strict=True))
        result.copy_(made[id(result)])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make this CPU pass for a GPU. Returns the log: "recorded" and "played", in order."""
    log: list[str] = []
    monkeypatch.setattr("unmask.encoder.runtime.kernels.library", lambda: None)  # those are for CPUs

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()
        with Tape() as tape:
            result = run()
        log.append("recorded")

        def again() -> None:
            log.append("played")
            tape.play(result)

        return again, result

    def fetch(vectors: Tensor) -> Callable[[], np.ndarray]:
        home = vectors.clone().numpy()
        return lambda: home

    def stand_in(*positional: object, **named: object) -> Tensor:
        call = inspect.signature(varlen_attn).bind(*positional, **named).arguments
        left, right = call["window_size"]
        q, k, v, bounds = (call[name] for name in ("query", "key", "value", "cu_seq_q"))
        return varlen(q, k, v, bounds, left, right, call["max_q"], call["scale"])

    stand_in.__signature__ = inspect.signature(varlen_attn)  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(cuda_runtime, "capture", record)
    monkeypatch.setattr(cuda_runtime, "current_device", lambda device: nullcontext())
    monkeypatch.setattr(cuda_runtime, "pinned", torch.from_numpy)
    monkeypatch.setattr(cuda_runtime, "copy_to_host", fetch)
    kernels = (attention.varlen_kernel, attention._torch_kernel, attention._flash_attn_kernel)
    for cached in kernels:
        cached.cache_clear()
    yield log
    for cached in kernels:
        cached.cache_clear()


def on_gpu(folder: Path, **options: Any) -> Encoder:
    encoder = Encoder.load(folder, **{"dtype": "bfloat16", **options})
    encoder._runtime = CudaRuntime(encoder._decoder, encoder.pooling, encoder.device)
    return encoder


def near(ours: np.ndarray, theirs: np.ndarray, cosine: float = 0.9999) -> bool:
    products = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return bool((products > cosine).all())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma", "tiny_mistral_instruct"])
def test_a_recorded_forward_serves_other_texts(name: str, golden_dir: Path, cuda: list[str]) -> None:
    encoder, plain = on_gpu(golden_dir / name), Encoder.load(golden_dir / name, dtype="bfloat16")
    alike = [TEXTS[:3], TEXTS[:3], ["two words", "three short words", "a"], ["three short stones", "b", "c d"]]
    for texts in (*alike, ["stone " * 3, "b"], ["c", "d", "e"], *alike):
        assert near(encoder.encode(texts), plain.encode(texts))
    assert cuda.count("recorded") >= 1
    assert cuda.count("played") >= 4


def test_what_comes_once_is_not_recorded(golden_dir: Path, cuda: list[str]) -> None:
    encoder = on_gpu(golden_dir / "tiny_llama")
    encoder.encode(["word " * 3])
    encoder.encode(["word " * 90])
    assert cuda == []
    encoder.encode(["other " * 3])
    assert cuda == ["recorded", "played"]
    encoder.encode(["third " * 3])
    assert cuda == ["recorded", "played", "played"]


def test_many_tokens_are_not_recorded(golden_dir: Path, cuda: list[str]) -> None:
    encoder = on_gpu(golden_dir / "tiny_llama")
    assert isinstance(encoder._runtime, CudaRuntime)
    encoder._runtime._max_graph_tokens = 32
    for _ in range(3):
        encoder.encode(["word " * 90])
    assert cuda == []


few_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@pytest.fixture
def pair(golden_dir: Path, cuda: list[str]) -> tuple[Encoder, Encoder]:
    return on_gpu(golden_dir / "tiny_llama"), Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.lists(few_words, min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_calls_in_any_order(calls: list[list[str]], pair: tuple[Encoder, Encoder]) -> None:
    encoder, plain = pair  # recorded once, used for all that is tried
    for texts in calls:
        assert near(encoder.encode(texts), plain.encode(texts))


def test_several_threads_do_not_mix(golden_dir: Path, cuda: list[str]) -> None:
    encoder, plain = on_gpu(golden_dir / "tiny_llama"), Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")
    calls = [[f"{WORDS[i % 10]} {WORDS[(i // 3) % 10]}", WORDS[i % 7]] for i in range(40)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(encoder.encode, calls))
    assert all(near(ours, plain.encode(texts)) for ours, texts in zip(results, calls, strict=True))


def test_trainable_decoder_ends_recording(golden_dir: Path, cuda: list[str]) -> None:
    encoder = on_gpu(golden_dir / "tiny_llama")
    before = [encoder.encode(["some words"]) for _ in range(3)][-1]
    assert "played" in cuda
    cuda.clear()
    with torch.no_grad():
        encoder.trainable_decoder().get_parameter("norm.weight").mul_(torch.linspace(0.1, 3, encoder.dim))
    after = encoder.encode(["some words"])
    assert cuda == []
    assert not near(before, after, 0.99)
    encoder.replace_decoder(Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16").trainable_decoder())
    assert near(before, encoder.encode(["some words"]))
    assert cuda == []


def test_what_cannot_be_recorded_is_computed(
    golden_dir: Path, cuda: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_runtime, "capture", refuse)
    encoder, plain = on_gpu(golden_dir / "tiny_llama"), Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")
    with caplog.at_level("WARNING", "unmask"):
        for _ in range(3):
            assert near(encoder.encode(TEXTS[:2]), plain.encode(TEXTS[:2]))
    assert [record.getMessage() for record in caplog.records] == [
        "forwards of few tokens are not recorded: operation not permitted when stream is capturing"
    ]


def test_without_a_suitable_kernel_attention_goes_by_length_groups(golden_dir: Path, cuda: list[str]) -> None:
    encoder, plain = on_gpu(golden_dir / "tiny_llama", dtype="float32"), Encoder.load(golden_dir / "tiny_llama")
    for _ in range(3):
        assert np.abs(encoder.encode(TEXTS) - plain.encode(TEXTS)).max() < 1e-5
    assert cuda == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pool_bags_equals_pool(pooling: str, golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama", pooling=pooling)
    prompts = encoder.prompts.build(TEXTS, "find what is meant:")
    hidden = encoder.states([prompt.ids for prompt in prompts])
    chosen = pooling_bags(prompts, pooling)
    ends = np.append(chosen.starts, len(chosen.rows))
    pooled = pool_bags(hidden, *(torch.from_numpy(x) for x in (chosen.rows, chosen.weights, ends)))
    torch.testing.assert_close(pooled, pool(hidden, prompts, pooling), rtol=1e-5, atol=1e-6)


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=100).map(lambda ls: GraphSize(sum(ls), len(ls), max(ls))),
)
def test_a_padded_size_fits_the_pack_with_little_padding(exact: GraphSize) -> None:
    padded = exact.padded()
    assert all(has >= needs for has, needs in zip(padded, exact, strict=True))
    assert padded.padded() == padded
    assert padded.tokens < exact.tokens + max(16, exact.tokens / 4 + 1)


def test_pack_buffer_and_view_agree(golden_dir: Path) -> None:
    prompts = Encoder.load(golden_dir / "tiny_llama").prompts.build(["one", "two words"])
    lengths = [len(prompt.ids) for prompt in prompts]
    size = GraphSize(sum(lengths), 2, max(lengths)).padded()
    buffer = pack_buffer(prompts, "mean", size)
    assert len(buffer) == size.buffer_length
    inputs = PackInputs.view(torch.from_numpy(buffer), size)
    assert inputs.ids[: sum(lengths)].tolist() == [*prompts[0].ids, *prompts[1].ids]
    assert inputs.positions[: sum(lengths)].tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert inputs.cu_seqlens.tolist() == [0, lengths[0], *[sum(lengths)] * (size.sequences - 1)]
    pooled = [prompt.pooled[1] - prompt.pooled[0] for prompt in prompts]
    assert inputs.bags.tolist() == [0, pooled[0], *[sum(pooled)] * (size.sequences - 1)]
    assert inputs.weights.sum().item() == pytest.approx(2)


def test_two_packs_are_in_flight() -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(pack: int) -> int:
        both.wait()
        return pack * 2

    assert pipelined_map(meet, [1, 2, 3, 4]) == [2, 4, 6, 8]
    assert pipelined_map(lambda pack: pack, [7]) == [7]
    assert pipelined_map(meet, []) == []


def test_texts_in_blocks_keep_their_order_and_their_index(
    golden_dir: Path, cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.encoder.encoder._BLOCK_TEXTS", 4)
    encoder, plain = on_gpu(golden_dir / "tiny_llama"), Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")
    texts = [f"{word} {other}" for word in WORDS for other in WORDS[:2]]
    assert near(encoder.encode(texts), plain.encode(texts))
    assert encoder.encode([]).shape == (0, encoder.dim)
    with pytest.raises(EmptyText, match="input 9 is empty") as error:
        encoder.encode([*texts[:9], "", *texts[:5]])
    assert error.value.index == 9
