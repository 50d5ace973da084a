"""The cache never returns a wrong vector, with several writers at once and after a writer was killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import StorageError
from unmask.evaluate.cache import VectorCache

WIDTH = 3


def vector_of(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[: WIDTH * 2], dtype="<u2").astype(np.float32)


def compute(texts: list[str]) -> np.ndarray:
    return np.stack([vector_of(text) for text in texts])


def encode(cache: VectorCache, texts: list[str], instruction: str = "", chunk: int = 4) -> np.ndarray:
    return cache.encode(texts, instruction, compute, chunk=chunk)


def refuse(texts: list[str]) -> np.ndarray:
    raise AssertionError(f"computed again: {texts}")


texts = st.lists(st.text(max_size=8), max_size=12)


@settings(max_examples=60)
@given(calls=st.lists(st.tuples(st.integers(0, 2), texts), max_size=8))
def test_interleaved_writers_agree(
    calls: list[tuple[int, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Several caches on one folder, as in several processes, return the right vector for every text."""
    folder = tmp_path_factory.mktemp("cache")
    writers = [VectorCache(folder, "model", WIDTH) for _ in range(3)]
    for writer, batch in calls:
        vectors = encode(writers[writer], batch)
        assert vectors.shape == (len(batch), WIDTH)
        for text, vector in zip(batch, vectors, strict=True):
            np.testing.assert_array_equal(vector, vector_of(text))
    everything = [text for _, batch in calls for text in batch]
    later = VectorCache(folder, "model", WIDTH)
    assert later.encode(everything, "", refuse).shape == (len(everything), WIDTH)


@settings(max_examples=60)
@given(keys_cut=st.integers(0, 200), vectors_cut=st.integers(0, 80), more=texts)
def test_a_truncated_tail_is_overwritten(
    keys_cut: int, vectors_cut: int, more: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    before = [f"text {i}" for i in range(6)]
    encode(VectorCache(folder, "model", WIDTH), before)
    for file, cut in (("keys-3.sha256", keys_cut), ("vectors-3.f32", vectors_cut)):
        path = folder / "model" / file
        os.truncate(path, max(0, path.stat().st_size - cut))
    cache = VectorCache(folder, "model", WIDTH)
    for batch in (more, before, more + before):
        np.testing.assert_array_equal(encode(cache, batch), compute(batch) if batch else np.empty((0, WIDTH)))
    np.testing.assert_array_equal(VectorCache(folder, "model", WIDTH).encode(before, "", refuse), compute(before))


def test_instructions_and_revisions_are_kept_apart(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "one", WIDTH)
    calls: list[list[str]] = []

    def counted(part: list[str]) -> np.ndarray:
        calls.append(part)
        return compute(part)

    cache.encode(["c"], "ab", counted)
    cache.encode(["bc"], "a", counted)
    cache.encode(["c"], "ab", counted)
    VectorCache(tmp_path, "two", WIDTH).encode(["c"], "ab", counted)
    assert calls == [["c"], ["bc"], ["c"]]


def test_a_repeated_text_is_computed_once_and_progress_adds_up(tmp_path: Path) -> None:
    steps: list[int] = []
    computed: list[str] = []

    def counted(part: list[str]) -> np.ndarray:
        computed.extend(part)
        return compute(part)

    repeated = ["a", "b", "a", "c", "b"]
    VectorCache(tmp_path, "model", WIDTH).encode(repeated, "", counted, chunk=2, progress=steps.append)
    assert sorted(computed) == ["a", "b", "c"]
    assert sum(steps) <= len(repeated)


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "model", WIDTH)
    with pytest.raises(ValueError, match="not \\(n, 3\\)"):
        cache.encode(["a"], "", lambda part: np.zeros((len(part), 5), dtype=np.float32))
    assert len(VectorCache(tmp_path, "model", WIDTH)) == 0


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="UNMASK_HOME"):
        VectorCache(tmp_path / "file", "model", WIDTH)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.evaluate.test_cache import WIDTH, compute
from unmask.evaluate.cache import VectorCache

def slowly(part):
    print(len(part), flush=True)
    time.sleep(0.01)
    return compute(part)

VectorCache(Path(sys.argv[1]), "model", WIDTH).encode([f"text {i}" for i in range(5000)], "", slowly, chunk=5)
"""


def test_kill_9_loses_at_most_a_chunk(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parents[2])], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for _ in range(20):
        child.stdout.readline()
    time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cache = VectorCache(tmp_path, "model", WIDTH)
    assert len(cache) >= 19 * 5
    all_texts = [f"text {i}" for i in range(5000)]
    np.testing.assert_array_equal(cache.encode(all_texts, "", compute), compute(all_texts))
