"""`package_folder`: packages that pip installs to a folder of their own: the tests have other versions of them."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import model_cache
from unmask.disk import locked


def package_folder(requirements: Path) -> Path:
    """Return the folder of the packages that a file pins, installed by pip on first use.

    A Python that was started with -S sees them, and nothing of this environment, if its PYTHONPATH names the folder.
    """
    python = f"{sys.implementation.cache_tag}-{sys.platform}"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    folder = model_cache() / f"{requirements.stem}-{python}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
                command += ["--disable-pip-version-check", "--target", f"{scratch}/packages", "-r", str(requirements)]
                subprocess.run(command, check=True, stdout=sys.stderr)
                shutil.move(f"{scratch}/packages", folder)
    return folder
