"""Writes that survive a crash: atomic replacement, file locks, fsync, and one error for a disk that refuses."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from unmask.errors import StorageError, UsageError

# Advice of an error for files that lie under UNMASK_HOME.
HOME_IS_FULL = "free some space or set UNMASK_HOME elsewhere"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it replaces `target` only if the block ends without an error.

    Readers see the old file, or none, until the new one is complete and on the disk. If `target` is a link, the file
    that it leads to is replaced, and not the link.

    Raises:
        StorageError: the folder cannot be written, the disk is full, or `target` is a device, a pipe or a folder.
    """
    target = link_target(target)
    if target.exists() and not target.is_file():
        raise StorageError(f"cannot write {target}: it is no regular file, which could be replaced; name another")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with storage_errors(str(target), HOME_IS_FULL):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            fsync_path(partial)
            partial.replace(target)
    finally:
        with suppress(OSError):  # an error of the block counts, not one of the clean-up
            partial.unlink(missing_ok=True)


def link_target(path: Path) -> Path:
    """Return the file that a link leads to, also if it is not there yet; any other path as it is.

    Raises:
        StorageError: the link leads to itself.
    """
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot write {path}: it is a link that leads to itself; remove it") from error


def create_once(target: Path, text: str) -> None:
    """Write a new file that only its owner may read, unless there is one: of several processes, the first wins.

    Other processes see the whole file or none, except on a disk without hard links.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with storage_errors(str(target), HOME_IS_FULL):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _link_once(Path(name), target)
        finally:
            Path(name).unlink(missing_ok=True)


def _link_once(source: Path, target: Path) -> None:
    with suppress(FileExistsError):
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(source.read_bytes())
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, which gets its name only if the block ends without an error.

    Args:
        target: must not exist, or be an empty folder.

    Raises:
        StorageError: it cannot be written, or the disk is full; nothing is left of it then.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with storage_errors(str(target), "free some space"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def umask_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes at `path` the mode of any new file, as the umask says.

    safetensors writes to a temporary file of its own, which only its owner can read, and renames it.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


@contextmanager
def storage_errors(target: str, advice: str = "", *, action: str = "write") -> Iterator[None]:
    """Turn an OSError of the block into "cannot {action} {target}: {reason}; {advice}".

    Raises:
        StorageError: instead of the OSError.
        BrokenPipeError: as it is. The reader of a pipe has ended, and the storage is well.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        message = f"cannot {action} {target}: {error.strerror or error}"
        raise StorageError(f"{message}; {advice}" if advice else message) from error


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file without waiting; True on success. The lock ends with the process, even if it is killed."""
    if sys.platform == "win32":
        return True  # an open file cannot be replaced or removed there, so a second run fails by itself
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that finished meanwhile may have removed the file after we opened it.
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except OSError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file `path`, made if it is missing, and hold it during the block. Raises OSError."""
    with path.open("a") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def locked_where_possible(path: Path) -> Iterator[None]:
    """As `locked`, in a folder that is made if it is missing. Where nothing can be written, nobody waits."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        yield


def files_below(folder: Path, leaves_out: Callable[[str], bool] = lambda name: False) -> list[Path]:
    """Return the files in a folder and in those below it, by path. A linked folder is entered as any other.

    No folder is entered twice, so that a loop of links ends: first the folders themselves, then the linked ones.

    Args:
        leaves_out: tells by its name which file or folder does not count.

    Raises:
        UsageError: a folder cannot be read, or a link leads nowhere: its rows would be missing without a word.
    """
    files: list[Path] = []
    entered: set[tuple[int, int]] = set()
    linked = [folder]
    while linked:
        waiting = [linked.pop(0)]
        while waiting:
            current = waiting.pop()
            try:
                status = current.stat()
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(current) as entries:
                    children = sorted(Path(entry.path) for entry in entries if not leaves_out(entry.name))
            except OSError as error:
                raise UsageError(f"cannot read the folder {current}: {error.strerror or error}") from error
            for child in children:
                require_link_target(child)
                if child.is_dir():
                    (linked if child.is_symlink() else waiting).append(child)
                elif child.is_file():
                    files.append(child)
    return sorted(files)


def require_link_target(path: Path) -> None:
    """Raise UsageError if a path is a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a link to {path.readlink()}, which is not there; mend or remove the link")


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
