"""The process of one backend: loads it, runs it when told, says how long that took.

Each has its own, because thread pools of several libraries in one process disturb each other, because a crash in one
must not end the others, and because one of them needs packages that ours cannot live with. Requests and answers are
lines of JSON; vectors go through a file, outside the time that is measured.
"""

import importlib
import json
import os
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from backends import Job, Run, Setting


def load(request: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """A backend, warm: it has encoded a few texts of this run's shortest and longest."""
    module, function = request["load"].split(":")
    job = Job(
        folder=Path(request["folder"]),
        scratch=Path(request["scratch"]),
        threads=request["threads"],
        dtype=request["dtype"],
        setting=Setting(**request["setting"]),
        device=request["device"],
    )
    began = time.perf_counter()
    run: Run = getattr(importlib.import_module(f"backends.{module}"), function)(job)
    seconds = time.perf_counter() - began
    run(request["warm"])
    return run, {"seconds": seconds, "versions": versions(request["packages"])}


def versions(packages: list[str]) -> dict[str, str]:
    """Installed versions of those packages that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def serve(answers: TextIO) -> None:
    run: Run | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if run is None:
                run, answer = load(request)
            else:
                began = time.perf_counter()
                vectors = run(request["texts"])
                answer = {"seconds": time.perf_counter() - began}
                if request["vectors"]:
                    np.save(request["vectors"], np.asarray(vectors, dtype=np.float32))
        except Exception as error:  # noqa: BLE001 - whatever a library raises becomes its row's reason
            traceback.print_exc()
            missing = isinstance(error, ModuleNotFoundError)
            answer = {"error": f"{type(error).__name__}: {error}", "missing": error.name if missing else None}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    answer_pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log and not among the answers
    serve(answer_pipe)
