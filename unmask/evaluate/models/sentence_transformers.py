"""Models in folders of the sentence-transformers library."""

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.checkpoint.digest import file_sha256
from unmask.encoder.runtime.int8 import INT8_PRECISION, quantise_torch
from unmask.errors import CheckpointError, MissingPackages, UsageError
from unmask.evaluate.models.specification import ModelSpecification

# Suffix of the revision for each precision, which keeps its vectors apart from those of others in a cache.
_PRECISION_KEYS = {
    "float32": "",
    "bfloat16": "-bfloat16",
    "int8": f"-int8-{hashlib.sha256(INT8_PRECISION.encode()).hexdigest()[:8]}",
}
# Files that can change a vector. Pictures, read-mes and other formats in such a folder cannot.
_DIGESTED_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")


class SentenceTransformerModel:
    """A `SentenceTransformer` as an `EmbeddingModel`.

    A model that was published with prompts for queries and documents gets these: the query's wherever a task gives an
    instruction, the document's elsewhere.
    """

    kind: Literal["sentence-transformers"] = "sentence-transformers"

    def __init__(self, model: Any, folder: Path, name: str, dtype: str = "float32") -> None:
        self.name = name
        self._model = model
        prompts: dict[str, str] = model.prompts or {}
        self._query_prompt = prompts.get("query") or ""
        self._document_prompt = next((prompts[key] for key in ("document", "passage") if prompts.get(key)), "")
        self.takes_instructions = bool(self._query_prompt or self._document_prompt)
        self.dimensions = int(model.get_embedding_dimension())
        self.parameters: int | None = sum(parameter.numel() for parameter in model.parameters())
        # Vectors of another precision are other vectors: they must not meet in a cache.
        self.revision = _folder_digest(folder) + _PRECISION_KEYS[dtype]

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions]. The instruction only chooses the model's own prompt."""
        prompt = self._query_prompt if instruction else self._document_prompt
        return self._encode(texts, prompt or None)

    def encode_with_prompt(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """Vectors of texts with any prompt before each, as a teacher is asked; float32 [n, dimensions]."""
        return self._encode(texts, prompt)

    def _encode(self, texts: Sequence[str], prompt: str | None) -> np.ndarray:
        vectors = self._model.encode(list(texts), prompt=prompt, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens after truncation, without padding."""
        prompt = self._query_prompt if instruction else self._document_prompt
        encoded = self._model.tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=self._model.max_seq_length
        )
        return sum(len(ids) for ids in encoded["input_ids"])


def open_folder(specification: ModelSpecification) -> SentenceTransformerModel:
    """Load a sentence-transformers folder.

    Its precision is float32 unless the specification itself names another: the run's is that of our own models.

    Raises:
        MissingPackages: the package is not installed.
        UsageError: no such precision, or none of this device.
        CheckpointError: the folder is not one of that library.
    """
    dtype = specification.values.get("dtype", ("float32",))[-1]
    device = specification.one("device") or "cpu"
    if dtype not in _PRECISION_KEYS:
        raise UsageError(f"{specification.target}: dtype={dtype[:40]!r}; write float32, bfloat16 or int8")
    if dtype == "int8" and device != "cpu":
        raise UsageError(f"{specification.target}: dtype=int8 computes on a CPU; leave out device={device}")
    try:
        # Not by an import statement: a type checker would read the modules of all transformers' models for it.
        library = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise MissingPackages("a sentence-transformers model needs", "evaluate") from error
    folder = Path(specification.target).expanduser()
    if not (folder / "modules.json").is_file():
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}: name one that sentence-transformers has saved")
        raise CheckpointError(f"{folder} is not a sentence-transformers folder: it has no modules.json")
    try:
        model = library.SentenceTransformer(str(folder), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    # transformers keeps the precision of the file, which can be 16 bits.
    model = model.bfloat16() if dtype == "bfloat16" else model.float()
    if dtype == "int8":
        quantise_torch(model)
    return SentenceTransformerModel(model, folder, specification.display_name, dtype)


def _folder_digest(folder: Path) -> str:
    """Return 16 hex digits over the names and contents of the files that can change a vector."""
    files = sorted({file for pattern in _DIGESTED_FILES for file in folder.rglob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file_sha256(file))
    return digest.hexdigest()[:16]
