"""Spool of an unfinished encoding run: its vectors and its state on disk, so that a later run can go on."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from unmask.bulk.files import (
    NPY_HEADER_BYTES,
    npy_header,
    write_jsonl,
    write_out,
    write_parquet,
)
from unmask.bulk.report import Tally
from unmask.disk import fsync_path, storage_errors, try_lock
from unmask.errors import StorageError, UsageError

_FLOAT_BYTES = 4
# Vectors held at once while the output is made from the spool: a row group of parquet.
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class State:
    """Recorded state of a spool: counts of its rows, the SHA-256 of their texts, and how they were made.

    `replaces` is true if the run was told to replace an output that was there.
    """

    tally: Tally
    texts_sha256: str
    options: dict[str, Any]
    replaces: bool


class Spool:
    """The vectors of an unfinished run, from which a later one continues. One run at a time may open it.

    The folder holds `vectors`, an npy file whose header is written last; `state.json`, replaced only after the
    rows it counts are on disk; and `lock`. A finished run that is killed while it clears up
    leaves a state without vectors; such a state is ignored.

    Args:
        folder: made if it is not there; removed on `close` if nothing in it is worth resuming.
        output: the file it becomes, None for standard output.

    Raises:
        UsageError: another run has it open.
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, output: Path | None) -> None:
        self.folder = folder
        self.texts_sha256 = hashlib.sha256().hexdigest()
        self._output = output
        self._name, self._advice = str(output), "make room and run the same command again, which goes on where it was"
        if output is None:
            self._name, self._advice = "standard output", "set TMPDIR to a folder with more room"
        self._vectors_file, self._state_file = folder / "vectors", folder / "state.json"
        self._finished_file = folder / "finished"
        self._vectors: FileIO | None = None
        self._dim = 0
        self._options: dict[str, Any] = {}
        self._replaces = False
        with storage_errors(self._name, self._advice):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("wb")
        if not try_lock(self._lock):
            self._lock.close()
            raise UsageError(f"another run is writing {self._name}; wait for it, or choose another --output")

    def prepare(self, output: Path, restart: bool) -> None:
        """Raise UsageError if there is an output, unless this run or the one it resumes was told to `restart`."""
        if restart:
            with storage_errors(self._name, self._advice):
                self._state_file.unlink(missing_ok=True)
        exists, saved = output.exists(), self._saved()
        if exists and not restart and not (saved and saved.replaces):
            raise UsageError(f"{output} exists already; choose another --output, or add --restart to encode it again")
        self._replaces = exists

    def resume(self, options: dict[str, Any], dim: int) -> Tally:
        """Prepare to append rows of `dim` numbers behind the recorded rows; returns the counts of those.

        Raises:
            UsageError: they were made with other options.
            StorageError: fewer are there than were recorded.
        """
        saved, tally = self._saved(), Tally()
        if saved is not None:
            require_same_options(saved.options, options, str(self.folder))
            tally, self.texts_sha256 = saved.tally, saved.texts_sha256
        self._options, self._dim = options, dim
        recorded_bytes = NPY_HEADER_BYTES + tally.rows * dim * _FLOAT_BYTES
        with storage_errors(self._name, self._advice):
            self._vectors = FileIO(self._vectors_file, "r+" if saved else "w+")
            file_bytes = self._vectors.seek(0, os.SEEK_END)
            if saved and file_bytes < recorded_bytes:
                raise self._damaged(f"it holds {file_bytes:,} bytes of vectors and should hold {recorded_bytes:,}")
            self._vectors.seek(self._vectors.truncate(recorded_bytes))  # an interrupted write
        return tally

    def append(self, vectors: np.ndarray) -> None:
        """Add rows, float32 [n, dim].

        Raises:
            StorageError: there is no space. The recorded rows are not touched.
        """
        assert self._vectors is not None, "resume comes first"
        with storage_errors(self._name, self._advice):
            rest = memoryview(vectors.astype("<f4", copy=False).tobytes())
            while rest:
                rest = rest[self._vectors.write(rest) :]

    def record(self, tally: Tally, texts_sha256: str) -> None:
        """Fsync all rows so far, then record their counts: a later run may continue after them.

        Raises:
            StorageError: there is no space. What was recorded before still holds.
        """
        assert self._vectors is not None, "resume comes first"
        state = State(tally, texts_sha256, self._options, self._replaces)
        new = self.folder / "state.json.new"
        with storage_errors(self._name, self._advice):
            os.fsync(self._vectors.fileno())
            new.write_text(json.dumps(asdict(state)), encoding="utf-8")
            fsync_path(new)
            new.replace(self._state_file)

    def deliver(self, target: str, rows: int) -> None:
        """Turn the spool into the output of format `target`, atomically.

        Raises:
            StorageError: there is no space. The spool is kept.
        """
        assert self._vectors is not None, "resume comes first"
        finished = self._vectors_file if target == "npy" else self._finished_file
        with storage_errors(self._name, self._advice):
            if target == "npy":
                self._vectors.seek(0)
                self._vectors.write(npy_header(rows, self._dim))
            elif target == "parquet":
                made_with = {name: self._options[name] for name in ("model", "dtype") if name in self._options}
                write_parquet(finished, self._blocks(), self._dim, made_with)
            else:
                write_jsonl(finished, self._blocks())
            if self._output is not None:
                fsync_path(finished)
                finished.replace(self._output)
                fsync_path(self._output.parent)
        if self._output is None:
            with finished.open("rb") as content:
                write_out(content)
        self._vectors_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock. A spool without a recorded row is removed."""
        if self._vectors is not None:
            self._vectors.close()
        self._finished_file.unlink(missing_ok=True)  # half an output, if the disk is full
        if not (self._vectors_file.exists() and self._state_file.exists()):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _saved(self) -> State | None:
        """Read the state recorded last, None if there is none."""
        if not (self._vectors_file.exists() and self._state_file.exists()):
            return None
        try:
            saved = json.loads(self._state_file.read_bytes())
            return State(**{**saved, "tally": Tally(**saved["tally"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"state.json cannot be read ({error})") from error

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, each block float32 [n, dim] of at most _BLOCK_BYTES."""
        assert self._vectors is not None, "resume comes first"
        self._vectors.seek(NPY_HEADER_BYTES)
        row_bytes = self._dim * _FLOAT_BYTES
        while content := self._vectors.read(max(1, _BLOCK_BYTES // row_bytes) * row_bytes):
            yield np.frombuffer(content, dtype="<f4").reshape(-1, self._dim)

    def _damaged(self, what: str) -> StorageError:
        return StorageError(f"{self.folder} is damaged: {what}; add --restart to begin again")


def require_same_options(made_with: dict[str, Any], options: dict[str, Any], folder: str) -> None:
    """Check that an unfinished run was made with the options of this one.

    Raises:
        UsageError: with the options that differ, and both values.
    """
    # A run for which empty or long texts are an error has met none, so its rows are the same either way.
    met_none = {name for name in ("on_empty", "on_long") if made_with.get(name) == "error"}
    changed = [name for name in options if made_with.get(name) != options[name] and name not in met_none]
    if changed:
        was = ", ".join(f"{name}={made_with.get(name)!r}" for name in changed)
        now = ", ".join(f"{name}={options[name]!r}" for name in changed)
        raise UsageError(
            f"the unfinished run in {folder} was made with {was}, and this one has {now}; "
            "repeat the first command, or add --restart to begin again"
        )
