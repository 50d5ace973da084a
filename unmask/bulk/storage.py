"""Files and object stores by path or URL: local folders, `s3://`, `gs://`, `abfs://` and `hf://`.

pyarrow's filesystems read and write. This module adds three rules: an object is written whole or not at all, a name in
a message never holds a password, and a folder is listed in one order.
"""

import fnmatch
import glob
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from unmask.disk import atomic_write, files_below, fsync_path, require_link_target, storage_errors
from unmask.errors import StorageError, UsageError
from unmask.tables import first_surrogate, table_format

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

STANDARD_STREAM = "-"
# Names of the parts of an output begin so.
PART_PREFIX = "part-"
_GLOB = re.compile(r"[*?\[]")
_URL_GLOB = re.compile(r"[*\[]")
_READ_BYTES = 2**20
# Seconds before each new attempt at an object store that refuses for the moment.
_PAUSES = (0.5, 1.0, 2.0, 4.0)


def is_url(location: str) -> bool:
    """True for `scheme://...`."""
    return "://" in location


def public_name(location: str) -> str:
    """Return a path or URL without user, password and parameters, for messages and files.

    >>> public_name("s3://key:secret@bucket/in?region=eu-1")
    's3://bucket/in'
    """
    if not is_url(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_filesystem(location: str) -> "tuple[FileSystem, str]":
    """Return the filesystem of a URL, and the path inside it.

    Raises:
        UsageError: no filesystem reads such a URL.
        StorageError: the store cannot be reached, or its credentials are missing.
    """
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        if location.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            return PyFileSystem(FSSpecHandler(cast(Any, HfFileSystem()))), location.removeprefix("hf://").rstrip("/")
        filesystem, path = FileSystem.from_uri(location)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UsageError(
            f"{public_name(location)}: no such storage ({_first_line(error, location)}); "
            "use a path, s3://, gs://, abfs:// or hf://"
        ) from error
    except OSError as error:
        raise StorageError(f"{public_name(location)} cannot be reached: {_first_line(error, location)}") from error
    return filesystem, path.rstrip("/")


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        name: path or URL, as messages and outputs give it; `-` for standard input.
        size: bytes; None for a stream.
        modified: time of the last change in nanoseconds, 0 where it is not known.
        path: path inside `filesystem`.
        filesystem: None for a local path.
    """

    name: str
    size: int | None = None
    modified: int = 0
    path: str = ""
    filesystem: "FileSystem | None" = field(default=None, repr=False)

    @property
    def is_local(self) -> bool:
        """True for a path on this machine, which may be read twice."""
        return self.filesystem is None and self.size is not None

    def open(self) -> IO[bytes]:
        """Open the file for reading, seekable where it is no stream.

        Raises:
            UsageError: it cannot be opened.
        """
        try:
            if self.filesystem is None:
                return Path(self.name).open("rb")
            source = self.filesystem.open_input_file(self.path)
            return io.BufferedReader(cast(io.RawIOBase, source), _READ_BYTES)
        except OSError as error:
            raise UsageError(f"cannot read {self.name}: {error.strerror or _first_line(error)}") from error


def find_inputs(
    names: Sequence[str], input_format: str | None = None, output: str | None = None
) -> tuple[list[InputFile], tuple[str, ...]]:
    """Find the files that paths, folders, globs and URLs name, in the order given; inside a folder or glob by name.

    Args:
        names: one or more, or `-` alone.
        input_format: all files are in this format, so that no name in a folder must tell it.
        output: path or URL of the job's output. Its parts are no input.

    Returns:
        The files, and the names of files in folders that have the ending of no table format.

    Raises:
        UsageError: a name matches no file, a file is named twice, a name is not UTF-8, or a link leads nowhere.
        StorageError: a store cannot be listed.
    """
    if STANDARD_STREAM in names:
        if len(names) > 1:
            raise UsageError("- (standard input) is read alone; name files, or pipe everything")
        if sys.stdin is None:
            raise UsageError("standard input is closed; pipe texts into it, or name files")
        return [InputFile(STANDARD_STREAM)], ()
    files: dict[str, InputFile] = {}
    left_out: list[str] = []
    for name in names:
        files_there, from_folder = _files_of_url(name) if is_url(name) else _local_files(name)
        for file in files_there:
            if output is not None and _is_part(file, name, output):
                continue
            if from_folder and input_format is None and table_format(Path(file.name)) is None:
                left_out.append(file.name)
            elif first_surrogate(file.name) is not None:
                raise UsageError(f"the file name {file.name!a} is not UTF-8; rename the file")
            elif files.setdefault(file.name, file) is not file:
                raise UsageError(f"{file.name} is named twice, the second time by {public_name(name)}; name it once")
    if not files:
        raise UsageError(f"{', '.join(map(public_name, names))}: no file of texts there; see --input-format")
    return list(files.values()), tuple(left_out)


def _is_part(file: InputFile, source: str, output: str) -> bool:
    """True if a file that the input `source` names is a part in the folder `output`."""
    place = _place(file.name)
    return (
        place.name.startswith(PART_PREFIX) and place.parent == _place(output) and _endpoint(source) == _endpoint(output)
    )


def _place(location: str) -> PurePath:
    """Return a path or URL as a path to compare, that of a `file://` URL and of a link as the file's own."""
    scheme, separator, path = public_name(location).partition("://")
    if not separator:
        return Path(location).resolve()
    return Path(unquote(path)).resolve() if scheme == "file" else PurePosixPath(scheme, path)


def _endpoint(location: str) -> str:
    """Return the server that a URL names in its parameters: on another one, the same bucket is another one."""
    return parse_qs(urlsplit(location).query).get("endpoint_override", [""])[0] if is_url(location) else ""


def _local_files(name: str) -> tuple[list[InputFile], bool]:
    """Return the files of one local name, and whether a folder was listed for them."""
    path = Path(name)
    if path.is_dir():
        paths = files_below(path, _is_hidden_name)
        if not paths:
            raise UsageError(f"{name} is a folder without files")
        return [local_file(file) for file in paths], True
    if _GLOB.search(name) and not path.exists():
        matches = glob.glob(name, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        for match in matches:
            require_link_target(Path(match))
        paths = sorted(file for match in matches if (file := Path(match)).is_file())
        if not paths:
            raise UsageError(f"no file matches {name}")
        return [local_file(file) for file in paths], False
    return [local_file(path)], False


def local_file(path: Path) -> InputFile:
    """Describe a file, or a pipe, on this machine.

    Raises:
        UsageError: there is none.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not path.is_file():
        return InputFile(str(path))  # a pipe
    return InputFile(str(path), status.st_size, status.st_mtime_ns)


def _files_of_url(url: str) -> tuple[list[InputFile], bool]:
    """Return the files of a URL, and whether a folder was listed for them.

    `*` and `[` are patterns; `?` begins parameters.
    """
    from pyarrow.fs import FileSelector, FileType

    address, question, parameters = url.partition("?")
    match = _URL_GLOB.search(address)
    pattern = ""
    if match:
        folder = address[: match.start()].rpartition("/")[0]
        address, pattern = folder, address[len(folder) + 1 :]
    filesystem, path = open_filesystem(address + question + parameters)
    folder_name = public_name(address).rstrip("/")
    with _store_errors(folder_name, action="list"):
        info = filesystem.get_file_info(path)
        if info.type == FileType.File and not pattern:
            return [_remote_file(folder_name, info, filesystem)], False
        if info.type == FileType.NotFound:
            raise UsageError(f"nothing is at {folder_name}; check the name and the credentials")
        infos = filesystem.get_file_info(FileSelector(path, recursive=True))
    files = []
    for info in sorted(infos, key=lambda each: each.path):
        relative = PurePosixPath(info.path).relative_to(path)
        if info.type == FileType.File and not _is_hidden(relative) and (not pattern or _matches(relative, pattern)):
            files.append(_remote_file(f"{folder_name}/{relative}", info, filesystem))
    if not files:
        raise UsageError(
            f"no file matches {folder_name}/{pattern}" if pattern else f"{folder_name} is a folder without files"
        )
    return files, not pattern


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """Compare a path with a glob, where `*` stays within a folder and `**` does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(str(path), pattern.replace("**/", "*"))
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatch.fnmatchcase, path.parts, parts))


def _remote_file(name: str, info: Any, filesystem: "FileSystem") -> InputFile:
    return InputFile(name, info.size, info.mtime_ns or 0, info.path, filesystem)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(map(_is_hidden_name, path.parts))


def _is_hidden_name(name: str) -> bool:
    """True for names that writers of tables keep for themselves: `_unmask`, `_SUCCESS`, `.crc`."""
    return name.startswith((".", "_"))


class Store:
    """A folder of objects at a path or URL. An object is there whole, or not at all.

    Args:
        location: a path, made if need be, or a URL.

    Raises:
        UsageError, StorageError: as `open_filesystem`.
    """

    def __init__(self, location: str) -> None:
        self.name = public_name(location).rstrip("/") or "/"
        self.folder: Path | None = None
        self._filesystem: FileSystem | None = None
        self._root = ""
        if is_url(location):
            self._filesystem, self._root = open_filesystem(location)
        else:
            self.folder = Path(location)

    def put(self, name: str, content: bytes) -> None:
        """Write an object, replacing one of that name. After it returns, the object survives a crash.

        Raises:
            StorageError: it cannot be written; an earlier object of that name is as it was.
        """
        if self.folder is not None:
            target = self.folder / name
            advice = "make room and run the same command again, which goes on where it was"
            with storage_errors(str(target), advice):
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as partial:
                    partial.write_bytes(content)
                fsync_path(target.parent)
            return
        for pause in (*_PAUSES, None):
            try:
                self._put_object(f"{self._root}/{name}", content)
                return
            except OSError as error:
                if pause is None:
                    raise StorageError(
                        f"cannot write {self.name}/{name}: {_first_line(error)}; "
                        "run the same command again, which goes on where it was"
                    ) from error
                time.sleep(pause)

    def _put_object(self, path: str, content: bytes) -> None:
        """Write an object in one piece and check its length. Raises OSError."""
        assert self._filesystem is not None
        stream = self._filesystem.open_output_stream(path)
        # Not `with`: closing the stream after a failed write would leave a short object (arrow issue 40502).
        stream.write(content)
        stream.close()
        size = self._filesystem.get_file_info(path).size
        if size != len(content):
            raise OSError(f"{size} bytes arrived of {len(content)}")

    def get(self, name: str) -> bytes | None:
        """Return an object's content, None if there is none.

        Raises:
            StorageError: it cannot be read.
        """
        if self.folder is not None:
            with storage_errors(f"{self.folder / name}", action="read"):
                try:
                    return (self.folder / name).read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    return None
        assert self._filesystem is not None
        with _store_errors(f"{self.name}/{name}", action="read"):
            try:
                with self._filesystem.open_input_file(f"{self._root}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """List the objects in a folder of the store and in the folders below it, by name; [] if there is none.

        Raises:
            StorageError: it cannot be listed.
        """
        if self.folder is not None:
            top = self.folder / folder
            with storage_errors(str(top), action="list"):
                paths = [path for path in top.rglob("*") if path.is_file() and not path.name.startswith(".")]
            return sorted(path.relative_to(self.folder).as_posix() for path in paths)
        from pyarrow.fs import FileSelector, FileType

        assert self._filesystem is not None
        top = f"{self._root}/{folder}".rstrip("/")
        with _store_errors(f"{self.name}/{folder}", action="list"):
            infos = self._filesystem.get_file_info(FileSelector(top, recursive=True, allow_not_found=True))
        root = PurePosixPath(self._root)
        return sorted(str(PurePosixPath(info.path).relative_to(root)) for info in infos if info.type == FileType.File)

    def remove(self, name: str) -> None:
        """Remove an object, if there is one.

        Raises:
            StorageError: it cannot be removed.
        """
        if self.folder is not None:
            with storage_errors(str(self.folder / name), action="remove"):
                (self.folder / name).unlink(missing_ok=True)
            return
        assert self._filesystem is not None
        with _store_errors(f"{self.name}/{name}", action="remove"):
            try:
                self._filesystem.delete_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return


@contextmanager
def _store_errors(name: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {name}: {_first_line(error)}") from error


def _first_line(error: Exception, secret: str = "") -> str:
    """Return the first line of an error, without the URL that may hold a password."""
    line = str(error).partition("\n")[0]
    return line.replace(secret, public_name(secret)) if secret else line
