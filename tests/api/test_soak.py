"""Memory of a server: the default model under 64 clients, and a small one after many lengths.

The clients ask for 15 seconds, which shows what grows by about 10 kB with each answer. `UNMASK_SOAK_SECONDS=600` shows
smaller leaks.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from unmask import Encoder
from unmask.checkpoint import DEFAULT_MODEL as MODEL

CLIENTS = 64
FIRST = 8  # requests of each client before the memory counts: buffers, pools and the cache of vectors fill
SECONDS = float(os.environ.get("UNMASK_SOAK_SECONDS", "15"))
SAMPLES = 20
WORDS = [
    "the",
    "river",
    "house",
    "of",
    "science",
    "and",
    "winter",
    "market",
    "question",
    "doctor",
    "garden",
    "history",
    "without",
    "an",
    "answer",
    "today",
]


@contextmanager
def serving(tmp_path: Path, *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`unmask serve` on a free port: its URL and its process."""
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "unmask", "serve", "--port", "0", "--log-level", "warning", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
        try:
            assert process.stdout is not None
            match = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            assert match is not None, (tmp_path / "log").read_text()
            yield match[0], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout is not None
            process.stdout.close()


def texts_of_mixed_sizes() -> list[str]:
    """Log-normal lengths with median 12 words, up to 400."""
    generator = np.random.default_rng(1)
    lengths = np.clip(np.exp(generator.normal(np.log(12), 1.0, 120)).astype(int), 1, 400)
    return [" ".join(generator.choice(WORDS, length)) for length in lengths]


@pytest.mark.timeout(400 + SECONDS)
async def test_64_clients_get_right_vectors_and_memory_does_not_grow(tmp_path: Path) -> None:
    with serving(tmp_path) as (base_url, process):
        await soak(base_url, process)


def test_memory_does_not_grow_with_every_new_length(tiny_llama: Path, tmp_path: Path) -> None:
    """oneDNN keeps a compiled product for each number of rows and weight, and torch keeps it once more."""
    with (
        serving(tmp_path, "--model", str(tiny_llama)) as (base_url, process),
        OpenAI(base_url=base_url, api_key="any") as client,
    ):
        model = client.models.list().data[0].id

        def ask(words: int) -> None:
            client.embeddings.create(model=model, input="river " * words, extra_headers={"Prefer": "wait=60"})

        for words in range(1, 21):
            ask(words)
        before = process.memory_info().rss
        for words in range(21, 121):
            ask(words)
        grown = (process.memory_info().rss - before) / 2**20
    assert grown < 16, f"{grown:.0f} MiB after 100 lengths"


async def soak(base_url: str, process: psutil.Process) -> None:
    texts = texts_of_mixed_sizes()
    encoder = Encoder.load(MODEL)
    expected = encoder.encode(texts, normalize=True)
    worst, answered, memory = 0.0, 0, []
    generators = [np.random.default_rng(number) for number in range(CLIENTS)]
    # Retries would hide errors.
    async with AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=120.0) as client:
        # The model may still be loading: hold this one request until it is there.
        await client.embeddings.create(model=MODEL, input="ready?", extra_headers={"Prefer": "wait=60"})

        async def ask(generator: np.random.Generator) -> None:
            nonlocal worst, answered
            chosen = generator.integers(0, len(texts), size=int(generator.choice([1, 1, 1, 2, 4, 8])))
            answer = await client.embeddings.create(model=MODEL, input=[texts[i] for i in chosen])
            vectors = np.array([item.embedding for item in answer.data], dtype=np.float32)
            worst = max(worst, float(np.abs(vectors - expected[chosen]).max()))
            answered += 1

        async def begin(generator: np.random.Generator) -> None:
            for _ in range(FIRST):
                await ask(generator)

        async def go_on(generator: np.random.Generator) -> None:
            while time.monotonic() < end:
                await ask(generator)

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(SECONDS / SAMPLES)
                memory.append(process.memory_info().rss)

        await asyncio.gather(*map(begin, generators))
        end = time.monotonic() + SECONDS
        await asyncio.gather(watch(), *map(go_on, generators))
    assert answered > CLIENTS * FIRST
    assert worst <= 1e-5, "a vector depended on what else was in its batch"
    growth = np.median(memory[-5:]) / np.median(memory[:5])
    summary = f"{answered} answers, worst difference {worst:.1e}, {memory[-1] / 2**20:.0f} MiB, x{growth:.3f}"
    print(f"\n{summary}")  # noqa: T201 - the figures belong into the test's record
    assert growth <= 1.05, summary
