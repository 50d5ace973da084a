"""ONNX files that pool and scale by themselves, such as those of `unmask export --to onnx`, in ONNX Runtime."""

import hashlib
import importlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.checkpoint.digest import file_sha256
from unmask.errors import CheckpointError, MissingPackages
from unmask.evaluate.models.specification import ModelSpecification

_BATCH = 8
_OUTPUT = "sentence_embedding"
# Files beside the graph that decide a vector.
_DIGESTED_FILES = ("tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json")


class OnnxModel:
    """A graph and the tokenizer beside it, read as fastembed and TEI's ort backend read them.

    The graph knows the instructions that it was exported with. So a task's instruction only chooses the file's own
    prompt: the query's wherever a task gives one, the document's elsewhere.

    Attributes:
        precision: of the weights, as the file states it.
        prompts: by name, as text before a text.
        runtime: "ONNX Runtime" with its version.
    """

    kind: Literal["onnxruntime"] = "onnxruntime"
    parameters: int | None = None  # the graph does not count them

    def __init__(self, file: Path, name: str) -> None:
        """Load a file.

        Raises:
            MissingPackages: ONNX Runtime is not installed.
            CheckpointError: it cannot run the file, or there is no tokenizer for it.
        """
        try:
            # Not by an import statement: a type checker would read all of it.
            library: Any = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise MissingPackages("an ONNX file is read with", "export") from error
        folder = next(
            (place for place in (file.parent, file.parent.parent) if (place / _DIGESTED_FILES[0]).is_file()), None
        )
        if folder is None:
            raise CheckpointError(f"{file} has no tokenizer.json beside it or one folder above")
        self.name, self.runtime = name, f"ONNX Runtime {library.__version__}"
        self._tokenizer = _read_tokenizer(folder)
        options = library.SessionOptions()
        # Threads that wait by spinning take the cores from the rest of a busy machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise CheckpointError(f"ONNX Runtime cannot run {file}: {str(error).splitlines()[0]}") from error
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        if _OUTPUT not in outputs:
            raise CheckpointError(f"{file} has no output {_OUTPUT}, only {', '.join(outputs)}: its graph does not pool")
        self.dimensions = int(outputs[_OUTPUT][-1])
        self.precision = str(self._session.get_modelmeta().custom_metadata_map.get("dtype", "float32"))
        self.prompts = _read_prompts(folder)
        self.takes_instructions = any(self.prompts.values())
        self.revision = _digest([file, *_external_files(file), *(folder / part for part in _DIGESTED_FILES)])

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions]. The instruction only chooses the file's own prompt."""
        prompt = self._prompt(instruction)
        # Texts of a batch are padded to the longest.
        order: list[int] = np.argsort([len(text) for text in texts], kind="stable").tolist()
        vectors = self.encode_with_prompt([texts[at] for at in order], prompt)
        out = np.empty_like(vectors)
        out[order] = vectors
        return out

    def encode_with_prompt(self, texts: Sequence[str], prompt: str, batch: int = _BATCH) -> np.ndarray:
        """Return vectors of texts with a prompt before each, float32 [n, dimensions], `batch` texts at a time."""
        rows = [np.empty((0, self.dimensions), dtype=np.float32)]
        for start in range(0, len(texts), batch):
            encodings = self._tokenizer.encode_batch([prompt + text for text in texts[start : start + batch]])
            feed = {
                "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
                "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            }
            rows.append(self._session.run([_OUTPUT], feed)[0])
        return np.concatenate(rows)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens after truncation, without padding."""
        prompt = self._prompt(instruction)
        encodings = self._tokenizer.encode_batch([prompt + text for text in texts])
        return sum(sum(encoding.attention_mask) for encoding in encodings)

    def _prompt(self, instruction: str) -> str:
        return self.prompts.get("query" if instruction else "document", "")


def open_onnx(specification: ModelSpecification) -> OnnxModel:
    """Load an `.onnx` file.

    Raises:
        MissingPackages: ONNX Runtime is not installed.
        CheckpointError: the file cannot be used.
    """
    file = Path(specification.target).expanduser()
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    return OnnxModel(file, specification.display_name.removesuffix(".onnx"))


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        tokenizer.enable_truncation(int(settings["model_max_length"]))
        pad = str(settings["pad_token"])
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {folder} cannot be read: {error}") from error
    tokenizer.enable_padding(direction="right", pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return tokenizer


def _read_prompts(folder: Path) -> Mapping[str, str]:
    file = folder / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    own = json.loads(file.read_text(encoding="utf-8")).get("prompts") or {}
    return {str(name): str(text) for name, text in own.items()}


def _external_files(file: Path) -> list[Path]:
    """Return the files beside a graph that hold its tensors, by their names in it.

    Raises:
        MissingPackages: there are such files, and onnx is not installed.
    """
    # A graph with its weights inside has up to 2 GB; it is not worth being parsed only to find that out.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") < 0:
            return []
    try:
        library: Any = importlib.import_module("onnx")
    except ImportError as error:
        raise MissingPackages("an ONNX file with weights beside it is read with", "export") from error
    model = library.load(str(file), load_external_data=False)
    return [file.parent / name for name in sorted(set(_external_locations(model, library.TensorProto)))]


def _external_locations(message: Any, tensor_type: Any) -> Iterator[str]:
    """Yield the places of all tensors outside a message, wherever in it they stand: also in branches and functions."""
    if isinstance(message, tensor_type) and message.data_location == tensor_type.EXTERNAL:
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _external_locations(part, tensor_type)


def _digest(files: Sequence[Path]) -> str:
    """Return 16 hex digits over the contents of the files that are there."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file_sha256(file))
    return digest.hexdigest()[:16]
