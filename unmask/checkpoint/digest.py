"""SHA-256 of a model's files."""

import hashlib
import os
import time
from pathlib import Path

# Reading a small file again is cheap. A file that has just changed may change again within one step of the disk's
# clock: its times stay the same then.
_REMEMBERED_BYTES, _REMEMBERED_AFTER_S = 2**20, 2.0

# By place on the disk, size and times.
_digests: dict[tuple[int, ...], bytes] = {}


def file_sha256(file: Path) -> bytes:
    """Return the SHA-256 of a file.

    The digest of a large file is remembered in this process until its size, times or place on the disk change: it is
    checked when the file is found, and counts again in the revision of each model that uses it.
    """
    with file.open("rb") as opened:
        before = os.fstat(opened.fileno())
        state = _state(before)
        if state in _digests:
            return _digests[state]
        digest = hashlib.file_digest(opened, "sha256").digest()
        is_settled = time.time() - max(before.st_mtime, before.st_ctime) > _REMEMBERED_AFTER_S
        if before.st_size >= _REMEMBERED_BYTES and is_settled and _state(os.fstat(opened.fileno())) == state:
            _digests[state] = digest
    return digest


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
