"""Digests of files: those of large ones are remembered, and never for too long."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.checkpoint import digest as digest_module
from unmask.checkpoint.digest import file_sha256

LARGE = 2**20


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 5, LARGE - 1, LARGE, LARGE + 1]), st.booleans()), max_size=8))
def test_a_digest_is_that_of_the_content_now(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[int, bool]]
) -> None:
    file = tmp_path_factory.mktemp("digest") / "weights"
    for number, (size, in_place) in enumerate(contents):
        content = bytes([number]) * size
        if not in_place:
            file.unlink(missing_ok=True)
        file.write_bytes(content)
        os.utime(file, ns=(0, number))  # the clock of the disk may be slower than this test
        for _ in range(2):
            assert file_sha256(file) == hashlib.sha256(content).digest()


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def count(file: Path) -> bytes:
        read.append(file)
        return hashlib.sha256(file.read_bytes()).digest()

    monkeypatch.setattr(digest_module, "_sha256", count)
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    small.write_bytes(b"{}")
    large.write_bytes(bytes(LARGE))
    for file in (small, large) * 3:
        file_sha256(file)
    assert read.count(large) == 1
    assert read.count(small) == 3


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "weights")
