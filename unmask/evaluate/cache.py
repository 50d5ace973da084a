"""A cache of vectors on disk, keyed by (model revision, instruction, text), so that nothing is encoded twice.

One folder per model revision holds two append-only files: `vectors-<dimensions>.f32` (rows of float32) and
`keys-<dimensions>.sha256` (32 bytes per row). A row counts once its key is written, and the key is written after its
vector. A process that is killed in between leaves a tail that the next one overwrites, never a wrong vector.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from unmask.disk import HOME_IS_FULL, locked, storage_errors
from unmask.evaluate.models.embedding_model import EmbeddingModel, TruncatedModel, truncated

_KEY_BYTES = 32


class VectorCache:
    """The vectors of one model revision.

    Args:
        folder: parent folder of all revisions, for example `home() / "vectors"`.
        revision: content address of the model and everything else that decides a vector (precision, pooling).
        dimensions: numbers per vector.

    Raises:
        StorageError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, revision: str, dimensions: int) -> None:
        self._folder = folder / revision
        self._dimensions = dimensions
        self._vectors_file = self._folder / f"vectors-{dimensions}.f32"
        self._keys_file = self._folder / f"keys-{dimensions}.sha256"
        self._rows: dict[bytes, int] = {}
        with self._storage_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._vectors_file.touch()
            self._keys_file.touch()
        self._read_new_keys()

    def __len__(self) -> int:
        return len(self._rows)

    def encode(
        self,
        texts: Sequence[str],
        instruction: str,
        compute: Callable[[list[str]], np.ndarray],
        *,
        chunk: int = 1024,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return the vectors of `texts` in their order; compute and store those that are missing.

        Args:
            texts: any number of texts; a repeated text is computed once.
            instruction: part of the key; "" for documents.
            compute: texts -> [n, dimensions]; called with at most `chunk` texts, and each chunk is stored on return.
            progress: called with the number of texts that each step finished.

        Returns:
            float32 [len(texts), dimensions].
        """
        keys = [_key(text, instruction) for text in texts]
        missing: dict[bytes, str] = {}
        for key, text in zip(keys, texts, strict=True):
            if key not in self._rows:
                missing.setdefault(key, text)
        if progress is not None:
            progress(sum(key not in missing for key in keys))
        # Long texts first: neighbours of like length make the least padding for models that pad.
        pending = sorted(missing.items(), key=lambda item: -len(item[1]))
        for start in range(0, len(pending), chunk):
            part = pending[start : start + chunk]
            self._append([key for key, _ in part], compute([text for _, text in part]))
            if progress is not None:
                progress(len(part))
        return self._read([self._rows[key] for key in keys])

    def _read(self, rows: Sequence[int]) -> np.ndarray:
        if not rows:
            return np.empty((0, self._dimensions), dtype=np.float32)
        with self._storage_errors():
            # Complete rows only: another process may be in the middle of writing one.
            count = self._vectors_file.stat().st_size // (self._dimensions * 4)
            stored = np.memmap(self._vectors_file, dtype="<f4", mode="r", shape=(count, self._dimensions))
            return np.asarray(stored[np.asarray(rows)], dtype=np.float32)

    def _append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
        if vectors.shape != (len(keys), self._dimensions):
            raise ValueError(f"{len(keys)} texts gave vectors of shape {vectors.shape}, not (n, {self._dimensions})")
        with self._locked():
            self._read_new_keys()  # another process may have written since
            row = self._complete_rows()
            with self._vectors_file.open("r+b") as file:
                file.truncate(row * self._dimensions * 4)
                file.seek(0, os.SEEK_END)
                file.write(vectors.tobytes())
                file.flush()
                os.fsync(file.fileno())
            with self._keys_file.open("r+b") as file:
                file.truncate(row * _KEY_BYTES)
                file.seek(0, os.SEEK_END)
                file.write(b"".join(keys))
            for offset, key in enumerate(keys):
                self._rows[key] = row + offset

    def _read_new_keys(self) -> None:
        """Read the keys of rows that this or another process has written since the last call."""
        with self._storage_errors():
            count = self._complete_rows()
            with self._keys_file.open("rb") as file:
                data = file.read(count * _KEY_BYTES)
        for row in range(count):
            self._rows.setdefault(data[row * _KEY_BYTES : (row + 1) * _KEY_BYTES], row)

    def _complete_rows(self) -> int:
        """Count rows with both vector and key; after a crash of the machine either file may be the shorter one."""
        return min(
            self._keys_file.stat().st_size // _KEY_BYTES,
            self._vectors_file.stat().st_size // (self._dimensions * 4),
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._storage_errors(), locked(self._folder / "lock"):
            yield

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"vectors in {self._folder}", HOME_IS_FULL, action="keep")


class CachedModel:
    """An embedding model behind a `VectorCache`.

    A truncated model is cached by its base, at full length, so its truncation costs no further encoding.

    Args:
        model: any model, truncated or not.
        folder: parent folder of all revisions, for example `home() / "vectors"`.
        on_computed: called with (texts, instruction, seconds) after the model has encoded a chunk.

    Raises:
        StorageError: the folder cannot be made or read.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        folder: Path,
        *,
        on_computed: Callable[[Sequence[str], str, float], None] | None = None,
    ) -> None:
        self._base = model.base if isinstance(model, TruncatedModel) else model
        self._dimensions = model.dimensions
        self._cache = VectorCache(folder, self._base.revision, self._base.dimensions)
        self._on_computed = on_computed

    def encode(
        self,
        texts: Sequence[str],
        instruction: str = "",
        *,
        chunk: int = 1024,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return float32 [n, dimensions of the model]; `chunk` and `progress` as in `VectorCache.encode`."""

        def compute(missing: list[str]) -> np.ndarray:
            start = time.perf_counter()
            vectors = self._base.encode(missing, instruction)
            if self._on_computed is not None:
                self._on_computed(missing, instruction, time.perf_counter() - start)
            return vectors

        vectors = self._cache.encode(texts, instruction, compute, chunk=chunk, progress=progress)
        return truncated(vectors, self._dimensions)


def _key(text: str, instruction: str) -> bytes:
    # The length keeps ("ab", "c") and ("a", "bc") apart.
    head = instruction.encode("utf-8", "surrogatepass")
    content = len(head).to_bytes(8, "little") + head + text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()
