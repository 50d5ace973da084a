"""Memory of a model: the peak of a process that does nothing but load it and encode texts.

`measure_memory` starts that process, `python -m unmask.evaluate.memory`, and reads its answer. The process of an
evaluation cannot tell: it holds other models, memory that they gave back, and libraries that they loaded.
"""

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from unmask.evaluate.models import open_model
from unmask.evaluate.models.specification import parse_specification


class MemoryRequest(msgspec.Struct):
    """A model and the texts that it encodes, as the measuring process reads them from its standard input."""

    specification: str
    defaults: dict[str, str]
    texts: list[str]


class MemoryUnknown(Exception):
    """The memory was not measured; the message says why."""


def measure_memory(specification: str, defaults: Mapping[str, str], texts: Sequence[str]) -> int | None:
    """Return the bytes of memory that a process takes at most to load a model and to encode `texts` once.

    This is the peak resident memory of the whole process, as `/usr/bin/time -v` gives it: interpreter and libraries
    included, and mapped files as far as they were read. Libraries of several hundred megabytes count, since no model
    runs without them. Memory of a GPU does not count.

    Returns:
        None for an endpoint, whose memory is elsewhere, and off Linux, which alone keeps this figure.

    Raises:
        MemoryUnknown: the process could not load the model, or was killed.
        UsageError: the specification is wrong.
    """
    if parse_specification(specification, defaults).kind == "endpoint" or peak_resident_bytes() is None:
        return None
    request = MemoryRequest(specification, dict(defaults), list(texts))
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=msgspec.json.encode(request), capture_output=True, check=False
    )
    if done.returncode or not done.stdout.strip().isdigit():
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise MemoryUnknown(lines[-1] if lines else f"the measuring process ended with code {done.returncode}")
    return int(done.stdout)


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process since its start; None where there is no figure, as off Linux."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _answer_request() -> None:
    """Load the model of the request on standard input, encode its texts, and write the peak to standard output."""
    with contextlib.suppress(OSError):
        # Where memory runs out, the kernel ends this process and spares the evaluation.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MemoryRequest)
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        open_model(request.specification, request.defaults).encode(request.texts)
    sys.stdout.write(str(peak_resident_bytes()))


if __name__ == "__main__":
    _answer_request()
