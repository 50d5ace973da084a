"""Vectors on disk, found by (model revision, instruction, text), so that nothing is encoded twice.

One folder per model revision holds two append-only files: `vectors.f32` (rows of float32) and `keys.sha256` (32 bytes
per row). A row counts once its key is written, and the key is written after its vector, so a process that is killed
between the two leaves a tail that the next one overwrites and never a wrong vector.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from unmask.errors import StorageError

_KEY_BYTES = 32


class VectorCache:
    """The vectors of one model revision.

    Args:
        folder: where all revisions are kept, for example `home() / "vectors"`.
        revision: content address of the model and everything else that decides a vector (precision, pooling).
        dimensions: numbers per vector.

    Raises:
        StorageError: the folder cannot be made or read, or holds vectors of another length.
    """

    def __init__(self, folder: Path, revision: str, dimensions: int) -> None:
        self._folder = folder / revision
        self._dimensions = dimensions
        self._vectors_file = self._folder / f"vectors-{dimensions}.f32"
        self._keys_file = self._folder / f"keys-{dimensions}.sha256"
        self._rows: dict[bytes, int] = {}
        with _storage(self._folder):
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
        """Vectors of `texts` in their order, computing and keeping those that are not here yet.

        Args:
            texts: any number of texts; a repeated text is computed once.
            instruction: part of the key; "" for documents.
            compute: texts -> [n, dimensions]; called with at most `chunk` texts, each chunk kept when it returns.
            progress: told the number of texts that each step settled.

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
        with _storage(self._folder):
            # Whole rows only: another process may be in the middle of its own.
            whole = self._vectors_file.stat().st_size // (self._dimensions * 4)
            stored = np.memmap(self._vectors_file, dtype="<f4", mode="r", shape=(whole, self._dimensions))
            return np.asarray(stored[np.asarray(rows)], dtype=np.float32)

    def _append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
        if vectors.shape != (len(keys), self._dimensions):
            raise ValueError(f"{len(keys)} texts gave vectors of shape {vectors.shape}, not (n, {self._dimensions})")
        with self._locked():
            self._read_new_keys()  # another process may have written since
            row = self._whole_rows()
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
        """Learn of rows that were written since the last look, by this or another process."""
        with _storage(self._folder):
            whole = self._whole_rows()
            with self._keys_file.open("rb") as file:
                data = file.read(whole * _KEY_BYTES)
        for row in range(whole):
            self._rows.setdefault(data[row * _KEY_BYTES : (row + 1) * _KEY_BYTES], row)

    def _whole_rows(self) -> int:
        """Rows that have both a vector and a key; after a crash of the machine either file may be the shorter one."""
        return min(
            self._keys_file.stat().st_size // _KEY_BYTES,
            self._vectors_file.stat().st_size // (self._dimensions * 4),
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        with _storage(self._folder), (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _key(text: str, instruction: str) -> bytes:
    # The length keeps ("ab", "c") and ("a", "bc") apart.
    head = instruction.encode("utf-8", "surrogatepass")
    whole = len(head).to_bytes(8, "little") + head + text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(whole).digest()


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep vectors in {folder}: {error.strerror or error}; free some space or set UNMASK_HOME elsewhere"
        ) from error
