"""The precisions that `dtype="auto"` has chosen on this machine, kept under UNMASK_HOME. Imports no torch."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from unmask.home import home


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and why it was chosen.

    Attributes:
        dtype: name of the precision, as for `Encoder.load`.
        reason: one sentence with the figures of every precision that was measured.
        model: name that the model was loaded by; empty where nobody needs it.
    """

    dtype: str
    reason: str
    model: str = ""


def choices_folder() -> Path:
    """Return the folder of the choices: one JSON file for each model and kind of machine."""
    return home() / "precision"


def read_choice(file: Path) -> PrecisionChoice | None:
    """Read a choice; None if there is none, or the file is damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return PrecisionChoice(str(values["dtype"]), str(values["reason"]), str(values.get("model", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def choices_of_processor() -> list[PrecisionChoice]:
    """Read the choices that were measured on this processor with the installed torch, newest first."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        return []
    by_time = []
    for file in choices_folder().glob("*.json"):
        try:
            machine, seconds = json.loads(file.read_text(encoding="utf-8"))["machine"], file.stat().st_mtime
            is_ours = machine["processor"] == processor_name() and machine["torch"].partition("+")[0] == torch
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        choice = read_choice(file)
        if is_ours and choice is not None:
            by_time.append((seconds, choice))
    return [choice for _, choice in sorted(by_time, key=lambda pair: -pair[0])]


def processor_name() -> str:
    """Return the number of cores of this machine and the name of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else platform.processor()
