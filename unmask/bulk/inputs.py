"""Inputs of a bulk job: the texts of all its files, in order, cut into chunks."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from types import TracebackType

from unmask.bulk.chunks import Chunk, cut
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import INPUT_FORMATS, format_of, label_of, open_texts, row_count
from unmask.bulk.storage import find_inputs


class Inputs:
    """The texts of the files that a job names. Use it as a context manager, and read it once.

    The first file is opened at once, so that a wrong column is found before a model is loaded.

    Attributes:
        files: the files, in order, without the parts of the output.
        left_out: names of files in folders that are no tables.

    Raises:
        UsageError: a name matches no file, or does not tell its format; or the first file cannot be read.
        StorageError: a store cannot be listed.
    """

    def __init__(self, job: EncodeJob) -> None:
        self.files, self.left_out = find_inputs(job.inputs, job.input_format, job.output)
        self._formats = [
            format_of(file.name, job.input_format, INPUT_FORMATS, "txt", "--input-format") for file in self.files
        ]
        self._column = job.column
        self._open_file = ExitStack()
        self._number = self._row = 0
        self._texts = self._open(0)

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_file.close()

    @property
    def label(self) -> str:
        """Return a name for all files in messages."""
        return label_of(self.files[0].name) if len(self.files) == 1 else f"one of the {len(self.files):,} inputs"

    @property
    def at_hand(self) -> bool:
        """True if no file is a pipe, from which the next text may be long in coming."""
        return all(file.size is not None for file in self.files)

    def rows(self) -> int | None:
        """Count the rows of all files, for display; None where that would take long."""
        counts = [row_count(file, kind) for file, kind in zip(self.files, self._formats, strict=True)]
        return None if None in counts else sum(count for count in counts if count is not None)

    def identity(self) -> dict[str, object]:
        """Return what several files must still be when a run is resumed. One file may have grown at its end."""
        if len(self.files) == 1:
            return {}
        digest = hashlib.sha256(repr([(file.name, file.size) for file in self.files]).encode())
        return {"inputs": f"{len(self.files)} files, {digest.hexdigest()[:16]}"}

    def skip(self, rows: int) -> Iterator[str]:
        """Yield the first `rows` texts, after which `chunks` goes on; fewer if there are no more."""
        while rows:
            for text in islice(self._texts, rows):
                rows -= 1
                self._row += 1
                yield text
            if rows and not self._open_next():
                return

    def chunks(self, max_length: int) -> Iterator[Chunk]:
        """Cut the texts that are left into chunks, none across two files.

        Args:
            max_length: tokens of a text that the model reads.
        """
        while True:
            yield from cut(self._texts, self._number, self.files[self._number].name, max_length, self._row)
            if not self._open_next():
                return

    def _open_next(self) -> bool:
        if self._number + 1 == len(self.files):
            return False
        self._number, self._row = self._number + 1, 0
        self._texts = self._open(self._number)
        return True

    def _open(self, number: int) -> Iterator[str]:
        self._open_file.close()
        return self._open_file.enter_context(open_texts(self.files[number], self._formats[number], self._column))
