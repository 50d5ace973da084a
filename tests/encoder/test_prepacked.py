"""Prepacked weights on disk: the same bits, shared, rebuilt where they are damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask import Encoder
from unmask.encoder import prepacked
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.runtime import kernels

pytestmark = pytest.mark.skipif(
    kernels.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)
TEXTS = ["one text", "another one, which is longer", "a " * 90]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of prepacked weights, also of small models."""
    monkeypatch.setattr(prepacked, "home", lambda: tmp_path)
    monkeypatch.setattr(prepacked, "_FEW_WEIGHTS", 0)
    return tmp_path / "prepacked"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has an entry for each checkpoint that was read."""
    reads: list[bool] = []
    load = Decoder.load.__func__  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(Decoder, "load", classmethod(lambda *arguments: reads.append(True) or load(*arguments)))
    return reads


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_load_reads_no_checkpoint_and_gives_the_same_bits(
    model: str, dtype: str, golden_dir: Path, folder: Path, reads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Encoder.load(golden_dir / model, dtype=dtype)  # pyright: ignore[reportArgumentType]
    second = Encoder.load(golden_dir / model, dtype=dtype)  # pyright: ignore[reportArgumentType]
    assert len(reads) == 1 and len(list(folder.glob("*.weights"))) == 1
    with monkeypatch.context() as scope:
        scope.setattr(prepacked, "_FEW_WEIGHTS", 1 << 40)
        kept_nowhere = Encoder.load(golden_dir / model, dtype=dtype)  # pyright: ignore[reportArgumentType]
    for encoder in (first, second):
        assert np.array_equal(encoder.encode(TEXTS), kept_nowhere.encode(TEXTS))
        assert encoder.num_parameters == kept_nowhere.num_parameters
    plain = kept_nowhere.trainable_decoder().state_dict()
    for name, tensor in second.trainable_decoder().state_dict().items():
        assert torch.equal(tensor, plain[name])


def test_changing_a_loaded_model_leaves_the_file_alone(golden_dir: Path, folder: Path) -> None:
    before = Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    vectors = before.encode(TEXTS)
    with torch.no_grad():
        for parameter in before.trainable_decoder().parameters():
            parameter.mul_(2)
    assert not np.array_equal(before.encode(TEXTS), vectors)
    assert np.array_equal(Encoder.load(golden_dir / "tiny_llama", dtype="float32").encode(TEXTS), vectors)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "length", "empty", "version"])
def test_a_damaged_file_is_written_again(damage: str, golden_dir: Path, folder: Path, reads: list[bool]) -> None:
    vectors = Encoder.load(golden_dir / "tiny_llama", dtype="float32").encode(TEXTS)
    (file,) = folder.glob("*.weights")
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-64],
        "flip": whole[:-4000] + bytes([whole[-4000] ^ 1]) + whole[-3999:],
        "header": whole[:20] + b"\xff" * 20 + whole[40:],
        "length": b"\xff" * 8 + whole[8:],
        "empty": b"",
        "version": whole.replace(b'"format": 1', b'"format": 0', 1),
    }[damage]
    file.unlink()
    file.write_bytes(damaged)
    assert np.array_equal(Encoder.load(golden_dir / "tiny_llama", dtype="float32").encode(TEXTS), vectors)
    assert len(reads) == 2 and file.read_bytes() == whole


@pytest.mark.parametrize("refusal", ["no folder", "full"])
def test_a_disk_that_refuses_costs_only_time(
    refusal: str,
    golden_dir: Path,
    folder: Path,
    reads: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if refusal == "no folder":
        folder.write_text("a file in the place of the folder")
    else:

        def full(path: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("unmask.disk.fsync_path", full)
    for _ in range(2):
        assert np.isfinite(Encoder.load(golden_dir / "tiny_llama", dtype="float32").encode(TEXTS)).all()
    assert len(reads) == 2 and "not kept" in caplog.text
    assert folder.is_file() or not list(folder.glob("*.weights"))


def test_old_kernels_and_too_many_files_go(golden_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    (file,) = folder.glob("*.weights")
    old = file.with_name(f"{file.stem.rpartition('-')[0]}-0123456789abcdef.weights")
    file.rename(old)
    Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    assert not old.exists() and file.exists()
    monkeypatch.setattr(prepacked, "_MAX_BYTES", 3 * file.stat().st_size // 2)
    os.utime(file, (0, 0))
    Encoder.load(golden_dir / "tiny_gemma", dtype="float32")
    assert not file.exists() and len(list(folder.glob("*.weights"))) == 1


def test_a_large_model_is_loaded_from_its_checkpoint(
    golden_dir: Path, folder: Path, reads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked, "_MAX_FILE_BYTES", 1000)
    for _ in range(2):
        Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    assert len(reads) == 2 and not list(folder.glob("*.weights"))


@given(st.binary(max_size=100), st.integers(0, 99), st.integers(1, 255))
def test_any_changed_byte_changes_the_sum(content: bytes, at: int, change: int) -> None:
    changed = bytearray(content)
    if not changed:
        return
    changed[at % len(changed)] ^= change
    first, second = (prepacked._sum(np.frombuffer(bytes(part), np.uint8)) for part in (content, changed))
    assert first != second
