"""Process of one backend, seen from the benchmark's own process."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from backends import Backend, Setting

PATIENCE = 1800  # seconds for an export, a conversion or a pass over the texts


class Absent(Exception):
    """A backend that cannot be measured; the message is its row's reason."""


class Process:
    """One backend, loaded and warm.

    Attributes:
        setting: the one that it runs with.
        load_seconds: from the start of its `load` until it could run, conversions included.
        versions: of its packages.

    Raises:
        Absent: at construction and at each run, where it is not installed or fails.
    """

    def __init__(
        self,
        backend: Backend,
        setting: Setting,
        *,
        folder: Path,
        scratch: Path,
        threads: int,
        dtype: str,
        device: str,
        warm: Sequence[str],
        log: BinaryIO,
    ) -> None:
        self.backend, self.setting = backend, setting
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
        }
        self._process = subprocess.Popen(
            [python_of(backend), "-m", "backends.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        answer = self._ask(
            {
                "load": backend.load,
                "folder": str(folder),
                "scratch": str(scratch),
                "threads": threads,
                "dtype": backend.precision or dtype,
                "setting": asdict(setting),
                "device": device,
                "warm": list(warm),
                "packages": [*backend.install.split(), "torch", "transformers"],
            }
        )
        self.load_seconds: float = answer["seconds"]
        self.versions: dict[str, str] = answer["versions"]

    def run(self, texts: Sequence[str], file: Path | None = None) -> tuple[float, np.ndarray]:
        """Seconds for the texts, and their vectors if there is a file to pass them through."""
        seconds = self._ask({"texts": list(texts), "vectors": str(file) if file else None})["seconds"]
        return seconds, np.load(file) if file else np.empty(0)

    def close(self) -> None:
        """End the process and give its memory back."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            line = self._process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = b""
        if line is None:
            self.close()
            raise Absent(f"no answer within {PATIENCE} s")
        if not line:
            code = self._process.wait()
            self.close()
            raise Absent(f"its process ended with code {code}, see the log")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            missing = answer["missing"]
            raise Absent(how_to_install(self.backend) if missing else answer["error"].splitlines()[0][:200])
        return answer


def python_of(backend: Backend) -> str:
    """Return the Python interpreter that has the backend's packages.

    Raises:
        Absent: it has an environment of its own, and that is not there.
    """
    if backend.environment is None:
        return sys.executable
    own = Path(sys.prefix) / "peers" / backend.environment / "bin" / "python"
    if not own.is_file():
        raise Absent(how_to_install(backend))
    return str(own)


def how_to_install(backend: Backend) -> str:
    where = f"an environment of its own ({backend.environment}): " if backend.environment else ""
    return f"not installed: {where}pip install {backend.install}"


def keep_to(threads: int) -> None:
    """Let this process and those that it starts run on `threads` processors only, whatever libraries want."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
