"""Where unmask keeps what it must remember: `UNMASK_HOME`, or the platform's user data folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unmask.errors import StorageError


def home() -> Path:
    """The folder that holds models, caches and databases. Not created by asking for it."""
    chosen = os.environ.get("UNMASK_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("unmask", appauthor=False))


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` only if the block ends well.

    A reader therefore sees either no file or a whole one, whatever happens in between.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; free some space or set UNMASK_HOME elsewhere"
        ) from error
    finally:
        with suppress(OSError):  # what went wrong above is what is told
            partial.unlink(missing_ok=True)
