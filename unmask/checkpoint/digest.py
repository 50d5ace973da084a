"""SHA-256 of a model's files."""

import hashlib
from functools import lru_cache
from pathlib import Path

# A file that is written twice within the clock's step cannot be told apart by its times; reading a small one is cheap.
_REMEMBERED_BYTES = 2**20


def file_sha256(file: Path) -> bytes:
    """Return the SHA-256 of a file.

    The digest of a large file is remembered in this process until its size, times or place on the disk change: it is
    checked when the file is found, and counts again in the revision of each model that uses it.
    """
    stat = file.stat()
    if stat.st_size < _REMEMBERED_BYTES:
        return _sha256(file)
    return _remembered(file, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(256)
def _remembered(file: Path, *_state: int) -> bytes:
    return _sha256(file)


def _sha256(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
