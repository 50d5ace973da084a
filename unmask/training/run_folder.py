"""The files of a run, with which it can be resumed after a kill at any moment and be repeated elsewhere.

A run's folder holds
    run.json              the resolved recipe, versions, git revision, data digests, hardware
    metrics.jsonl         one line per step: loss, learning rate, tokens/s; and one per evaluation
    checkpoints/step-N/   parameters, optimiser and random state; written atomically; the last few are kept
    best/                 adapter (or weights) of the best evaluation so far
    adapter/ or model/    the result, when the run has ended
    curves.svg, curves.png
"""

import json
import os
import pickle
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from unmask import __version__
from unmask.disk import atomic_write, storage_errors
from unmask.errors import StorageError, UsageError

_STEP = "step-"


class RunFolder:
    """One run's files.

    Args:
        path: made if need be.
        keep: resumable checkpoints that stay.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self._keep = path, keep
        with _storage_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def begin(
        self, description: Mapping[str, Any], resume: bool, upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict
    ) -> dict[str, Any]:
        """Write `run.json`, or check that the one here describes the same run.

        Args:
            upgrade: brings a stored description to today's fields, so that an older run can be continued.

        Returns:
            The description that is there now.

        Raises:
            UsageError: another run's files are here, or this one's and `resume` is off. A run that failed before it
                wrote anything else is none.
        """
        file = self.path / "run.json"
        new: dict[str, Any] = json.loads(json.dumps(description))  # as it will be read again: JSON has no tuples
        if file.is_file() and not self._is_untouched():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                before = upgrade(stored)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{file} is damaged ({error}); remove {self.path} to begin anew") from error
            changed = sorted(key for key in ("recipe", "data") if before.get(key) != new.get(key))
            if changed:
                raise UsageError(
                    f"{self.path} holds a run with another {' and '.join(changed)}; choose another --output, "
                    f"or remove it to begin anew ({_difference(before, new)})"
                )
            if not resume:
                raise UsageError(f"{self.path} holds this run already; continue it with --resume, or remove it")
            if before != stored:
                self._write(file, before)
            return before
        self._write(file, new)
        return new

    def _is_untouched(self) -> bool:
        """True if nothing but the description of a run is here."""
        names = {entry.name for entry in self.path.iterdir()}
        return names <= {"run.json", "checkpoints"} and not any((self.path / "checkpoints").iterdir())

    @staticmethod
    def _write(file: Path, description: Mapping[str, Any]) -> None:
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically and remove the oldest ones.

        Raises:
            StorageError: no space or no permission; earlier checkpoints are as they were.
        """
        target = self.path / "checkpoints" / f"{_STEP}{step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        with _storage_errors(self.path):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                with (partial / "state.pt").open("wb") as file:
                    torch.save(dict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            except RuntimeError as error:  # torch's zip writer, when the disk is full
                raise OSError(f"the checkpoint of step {step} was not written: {error}") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            for old in self._steps()[: -self._keep]:
                shutil.rmtree(self.path / "checkpoints" / f"{_STEP}{old:08d}", ignore_errors=True)

    def step(self) -> int:
        """Return the step of the last checkpoint, 0 if there is none."""
        return max(self._steps(), default=0)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Read step and state of the last checkpoint, if there is one."""
        steps = self._steps()
        if not steps:
            return None
        file = self.path / "checkpoints" / f"{_STEP}{steps[-1]:08d}" / "state.pt"
        try:
            return steps[-1], torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            # torch's own message is a page long.
            reason = (isinstance(error, OSError) and error.strerror) or "it is damaged"
            raise StorageError(
                f"{file} cannot be read ({reason}); remove its folder to resume from an earlier one"
            ) from error

    def _steps(self) -> list[int]:
        numbers = (entry.name.removeprefix(_STEP) for entry in (self.path / "checkpoints").glob(f"{_STEP}*"))
        return sorted(int(step) for step in numbers if step.isdigit())

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        with _storage_errors(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read all complete lines of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines: list[dict[str, Any]] = []
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the process was killed while it wrote this one
        return lines

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of later steps, which a resumed run will do again."""
        lines = [line for line in self.metrics() if line.get("step", 0) <= step]
        with atomic_write(self.path / "metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def describe_run(
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    hardware: str,
    precision: str = "float32",
    rows: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """Return the content of `run.json`: enough to repeat the run elsewhere.

    Args:
        precision: that of the forward, as measured where the recipe says auto; a resumed run keeps it.
        rows: counts of each data set in memory, by their names.
    """
    from importlib.metadata import version

    names = ("torch", "numpy", "tokenizers", "safetensors")
    return {
        "recipe": dict(recipe),
        "data": dict(data),
        "rows": {name: dict(counts) for name, counts in (rows or {}).items()},
        "versions": {"unmask": __version__, "python": platform.python_version()}
        | {name: version(name) for name in names},
        "git": _git_revision(),
        "hardware": hardware,
        "precision": precision,
    }


def _git_revision() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the first difference of two nested descriptions."""

    def walk(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                difference = walk(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
                if difference:
                    return difference
            return None
        if isinstance(a, list) and isinstance(b, list) and len(a) != len(b):
            return f"{path} had {len(a)} entries, has {len(b)}"
        if isinstance(a, list) and isinstance(b, list):
            return next(
                filter(None, (walk(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))), None
            )
        return None if a == b else f"{path} was {a!r}, is {b!r}"

    old, new = ({key: side.get(key) for key in ("recipe", "data")} for side in (before, now))
    return walk(old, new, "") or "no difference"


def _storage_errors(path: Path) -> AbstractContextManager[None]:
    return storage_errors(str(path), "free some space and continue with --resume", action="write to")
