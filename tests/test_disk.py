"""Atomic writes, locks and the error for a disk that refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.disk import atomic_write, locked, storage_errors, try_lock, umask_mode
from unmask.errors import StorageError


def test_a_failed_block_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "out"
    with atomic_write(target) as partial:
        partial.write_text("old")
    with pytest.raises(ValueError), atomic_write(target) as partial:
        partial.write_text("half")
        raise ValueError
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_a_storage_error_that_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, atomic_write(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    said = f"cannot write {tmp_path / 'out'}: No space left on device; free some space or set UNMASK_HOME elsewhere"
    assert str(caught.value) == said


def test_try_lock_is_for_one_and_knows_a_removed_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("wb") as first, path.open("wb") as second:
        assert try_lock(first)
        assert not try_lock(second)
        path.unlink()
        first.close()
        assert not try_lock(second), "nobody else can see the file any more, so it keeps nobody out"


def test_storage_errors_say_what_to_do() -> None:
    with pytest.raises(StorageError) as caught, storage_errors("out.npy", "make room"):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == "cannot write out.npy: No space left on device; make room"


def test_locked_waits_for_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    order, lock = tmp_path / "order", tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from unmask.disk import locked\n"
        "with locked(Path(sys.argv[1])), Path(sys.argv[2]).open('a') as file: file.write('other\\n')"
    )
    with locked(lock):
        other = subprocess.Popen([sys.executable, "-c", script, str(lock), str(order)])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
        with order.open("a") as file:
            file.write("first\n")
    assert other.wait(60) == 0
    assert order.read_text().split() == ["first", "other"]


def test_a_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with atomic_write(tmp_path / "weights") as partial, umask_mode(partial):
        (tmp_path / "scratch").touch(mode=0o600)
        (tmp_path / "scratch").replace(partial)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "old").write_text("before")
    for name in ("old", "new"):
        with atomic_write(tmp_path / name) as partial:
            partial.write_text("after")
        assert (tmp_path / name).is_symlink() and (tmp_path / "elsewhere" / name).read_text() == "after"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError, match="leads to itself"), atomic_write(tmp_path / "loop"):
        pass


def test_a_pipe_or_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(StorageError, match="no regular file"), atomic_write(tmp_path / name) as partial:
            partial.write_text("x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()
