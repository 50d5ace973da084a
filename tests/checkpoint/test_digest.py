"""Digests of files: those of large ones are remembered, and never for too long."""

import hashlib
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.checkpoint import digest as digest_module
from unmask.checkpoint.digest import file_sha256

LARGE = 2**20


@pytest.fixture(autouse=True)
def remembered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "_REMEMBERED_AFTER_S", -60.0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_a_large_file_is_read_once_after_it_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Mock(wraps=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", digest)
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    small.write_bytes(b"{}")
    large.write_bytes(bytes(LARGE))
    for file, reads in ((small, 3), (large, 1)):
        digest.reset_mock()
        assert {file_sha256(file) for _ in range(3)} == {hashlib.sha256(file.read_bytes()).digest()}
        assert digest.call_count == reads
    monkeypatch.setattr(digest_module, "_REMEMBERED_AFTER_S", 60.0)
    fresh = tmp_path / "fresh.safetensors"
    fresh.write_bytes(bytes(LARGE))
    digest.reset_mock()
    assert file_sha256(fresh) == file_sha256(fresh)
    assert digest.call_count == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = tmp_path / "weights", hashlib.file_digest
    file.write_bytes(bytes(LARGE))

    def grow(opened: Any, name: str) -> Any:
        digest = read(opened, name)
        with file.open("ab") as end:
            end.write(b"more")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", grow)
        file_sha256(file)
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).digest()


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "weights")
