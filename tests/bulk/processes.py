"""Bulk jobs in processes of their own, for tests that kill them.

They are forked from a process that has imported torch already, so that one starts in a tenth of a second.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.fork_server import fork_server
from unmask.bulk import chunks, spool, units
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.storage import Store
from unmask.encoder.encoder import Encoder


@contextmanager
def encoding(model: Path, source: Path, outputs: Sequence[Path], dies_at: str = "") -> Iterator[ForkServerProcess]:
    """Encode a file to each output, in chunks of 64 rows, in a process that is killed when the block ends.

    Args:
        dies_at: name of a file; when it is about to be written to the disk, the process kills itself with SIGKILL.
    """
    process = fork_server().Process(target=_encode, args=(model, source, outputs, dies_at))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


@contextmanager
def encoding_parts(job: EncodeJob, model: Path) -> Iterator[Connection]:
    """Encode in units of two chunks of four rows, in a process that is killed when the block ends.

    Yields the connection by which it sends the name of each object that it has stored.
    """
    names, end = fork_server().Pipe(duplex=False)
    process = fork_server().Process(target=_encode_parts, args=(job, model, end))
    process.start()
    end.close()
    try:
        yield names
    finally:
        process.kill()
        process.join()
        process.close()
        names.close()


def resumed_at(output: Path) -> int:
    """The row at which the process began that finished an output."""
    return int(_resumed(output).read_text())


def _resumed(output: Path) -> Path:
    return output.with_name(f"{output.name}.resumed")


def _encode(model: Path, source: Path, outputs: Sequence[Path], dies_at: str) -> None:
    torch.set_num_threads(1)
    chunks.CHUNK_ROWS = 64
    sync = spool.fsync_path

    def sync_or_die(path: Path) -> None:
        if path.name == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    spool.fsync_path = sync_or_die
    encoder = Encoder.load(model)
    for output in outputs:
        report = run(EncodeJob((str(source),), str(output)), lambda: encoder)
        _resumed(output).write_text(str(report.resumed_at))


def _encode_parts(job: EncodeJob, model: Path, names: Connection) -> None:
    torch.set_num_threads(1)
    chunks.CHUNK_ROWS, units.UNIT_CHUNKS = 4, 2
    put = Store.put

    def put_and_tell(store: Store, name: str, content: bytes) -> None:
        put(store, name, content)
        names.send(name)

    Store.put = put_and_tell  # pyright: ignore[reportAttributeAccessIssue]
    run(job, lambda: Encoder.load(model))
