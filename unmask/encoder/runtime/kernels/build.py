"""Compile `kernels.c`, which includes the other files here, for one kind of processor.

Standard library only, so that building a wheel can run it too.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
_FILES = tuple(SOURCE.with_name(name) for name in ("kernels.c", "tiles.h", "training.c", "int8.c"))
# -std: vector extensions. No -ffast-math: sums keep their order.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# The kinds of processors by the name of their vector instructions.
TARGETS = {"avx512": ("-march=x86-64-v4",), "avx2": ("-march=x86-64-v3",), "neon": ()}


def targets() -> list[str]:
    """Kinds of processors that this machine's compiler can build for."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    if sys.platform == "win32":
        return []
    return {"x86_64": ["avx512", "avx2"], "aarch64": ["neon"], "arm64": ["neon"]}.get(machine, [])


def file_name(target: str) -> str:
    """Name of the library for a kind of processor; it changes with the source and the flags."""
    text = b"".join(file.read_bytes() for file in _FILES) + repr((_FLAGS, TARGETS[target])).encode()
    return f"{target}-{hashlib.sha256(text).hexdigest()[:16]}.so"


def compiler() -> str | None:
    """Path of a C compiler: the variable CC, else cc. None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


def compile_library(target: str, folder: Path) -> Path:
    """Compile the library for a kind of processor into a folder, atomically. Libraries of older sources are removed.

    Raises:
        OSError: the folder cannot be written, or there is no compiler.
        subprocess.CalledProcessError: the compiler refuses.
    """
    program = compiler()
    if program is None:
        raise FileNotFoundError("no C compiler: cc is not installed, and CC names none")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(target)
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [program, *_FLAGS, *TARGETS[target], "-o", temporary, str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    for old in folder.glob(f"{target}-*.so"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    for name in targets():
        sys.stdout.write(f"{compile_library(name, SOURCE.parent)}\n")
