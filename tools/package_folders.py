"""Folders of packages that cannot live in this environment, installed on first use and kept between runs.

A client or a runtime may need older packages than unmask. pip or npm installs what a file pins into a folder that is
named by the file's content, and a program reads the packages from there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from unmask.disk import locked
from unmask.errors import UsageError


def python_packages(requirements: Path, root: Path) -> Path:
    """Return the folder of the packages that a requirements file pins, dependencies included.

    Args:
        root: folder of such folders.

    Raises:
        CalledProcessError: pip cannot install them.
    """
    python = f"{sys.implementation.cache_tag}-{sys.platform}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    # A folder holds many modules that no program of ours imports.
    pip += [
        "--no-compile",
        "--disable-pip-version-check",
        "--target",
        "packages",
        "--requirement",
        str(requirements.absolute()),
    ]
    return _folder(requirements, root, python, "packages", pip)


def node_packages(manifest: Path, root: Path) -> Path:
    """Return a folder whose `node_modules` holds the packages of a package.json. No install script of a package runs.

    Args:
        root: folder of such folders.

    Raises:
        UsageError: node or npm is missing.
        CalledProcessError: npm cannot install them.
    """
    if missing := [program for program in ("node", "npm") if shutil.which(program) is None]:
        raise UsageError(f"{manifest} needs {' and '.join(missing)}: install Node.js 20 or newer")
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", "packages"]
    return _folder(manifest, root, f"node-{sys.platform}", "packages", npm, {"package.json": manifest})


def isolated_python(folders: Sequence[Path], *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python that sees the packages of folders, and none of this environment.

    Args:
        arguments: those of Python: a program and its own, or `-c` and code.
    """
    search_path = os.pathsep.join(map(str, folders))
    return [sys.executable, "-S", *arguments], {"PATH": os.environ["PATH"], "PYTHONPATH": search_path}


def link_packages(folder: Path, *distributions: str) -> Path:
    """Link packages of this environment into a folder, and return it: a second torch would be a gigabyte.

    Raises:
        PackageNotFoundError: this environment lacks a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for distribution in map(metadata.distribution, distributions):
        for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / name).symlink_to(Path(str(distribution.locate_file(name))))
    return folder


def _folder(
    pins: Path, root: Path, kind: str, name: str, command: Sequence[str], files: Mapping[str, Path] | None = None
) -> Path:
    """Run an installer that fills the folder `name` of a scratch folder, once for each content of `pins`."""
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    folder = root / f"{pins.stem}-{kind}-{digest}"
    root.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                (Path(scratch) / name).mkdir()
                for target, source in (files or {}).items():
                    shutil.copyfile(source, Path(scratch) / name / target)
                subprocess.run(command, check=True, stdout=sys.stderr, cwd=scratch)
                shutil.move(Path(scratch) / name, folder)
    return folder
