"""Table of the libraries to measure, a row each. Their code is loaded only in a process of their own (`worker.py`).

Nothing here imports more than the standard library, because one backend lives in a virtual environment without ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = Callable[[Sequence[str]], Any]  # texts -> float32 [n, width], in their order

LONGEST = 512  # tokens of a text, for all; the rest is cut


@dataclass(frozen=True)
class Setting:
    """One way to run a backend.

    Attributes:
        batch: texts of a batch; for llama.cpp tokens, which is what it counts.
        side_by_side: so many batches at a time on a part of the threads each; 1: one batch at a time on all of them.
    """

    batch: int = 32
    side_by_side: int = 1


@dataclass(frozen=True)
class Job:
    """Arguments of a backend's `load`.

    Attributes:
        folder: the weights as a hub folder.
        scratch: for the same weights in other formats; common to all backends.
        device: a torch device; only those of GPU_BACKENDS know any but the processor.
    """

    folder: Path
    scratch: Path
    threads: int
    dtype: str
    setting: Setting
    device: str


@dataclass(frozen=True)
class Backend:
    """One row.

    Attributes:
        name: as the table shows it.
        load: "module:function" of this package; the function takes a Job and gives a Run.
        precision: of its products; None: that of the run, `--dtype`.
        settings: tried on a part of the texts; the quickest is measured.
        install: what has to be there.
        unit: what `Setting.batch` counts.
        environment: name of its own virtual environment, for requirements that ours cannot meet.
    """

    name: str
    load: str
    install: str
    precision: str | None = None
    settings: tuple[Setting, ...] = (Setting(),)
    unit: str = "texts"
    environment: str | None = None


BATCHES = (Setting(32), Setting(8))
# The two that can run several batches at once get the better of that and of the usual way.
STREAMS = (Setting(32), Setting(8, side_by_side=2))
TOKENS = (Setting(512), Setting(2048))
# On a GPU, where a batch of 32 short texts is over before the next one is ready.
GPU_BATCHES = (Setting(64), Setting(256))
GPU_BACKENDS = ("unmask", "transformers", "sentence-transformers")

BACKENDS = {
    "unmask": Backend("unmask", "ours:load", "unmask"),
    "unmask-auto": Backend("unmask, auto", "ours:load", "unmask", "auto"),
    "unmask-int8": Backend("unmask, int8", "ours:load", "unmask", "int8"),
    "transformers": Backend("transformers", "pytorch:transformers", "transformers", settings=BATCHES),
    "sentence-transformers": Backend(
        "sentence-transformers", "pytorch:sentence_transformers", "sentence-transformers", settings=BATCHES
    ),
    "onnxruntime": Backend(
        "ONNX Runtime", "exported:onnxruntime_float32", "onnxruntime onnx onnxscript", "float32", STREAMS
    ),
    "onnxruntime-int8": Backend(
        "ONNX Runtime, dynamic int8", "exported:onnxruntime_int8", "onnxruntime onnx onnxscript", "int8", STREAMS
    ),
    "openvino": Backend("OpenVINO", "exported:openvino", "openvino", settings=STREAMS),
    "llama-cpp": Backend("llama.cpp, F32", "llama:load", "llama-cpp-python", "float32", TOKENS, "tokens"),
    "llama-cpp-f16": Backend("llama.cpp, F16", "llama:load", "llama-cpp-python", "float16", TOKENS, "tokens"),
    "llama-cpp-q8": Backend("llama.cpp, Q8_0", "llama:load", "llama-cpp-python", "int8", TOKENS, "tokens"),
    "infinity": Backend("infinity-emb", "infinity:load", "infinity-emb", "float32", BATCHES, environment="infinity"),
}
