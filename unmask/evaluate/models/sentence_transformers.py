"""Peers that are folders of the sentence-transformers library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.errors import CheckpointError, MissingPackages
from unmask.evaluate.models import Options, shown_name

# Everything that can decide a vector; what else lies in such a folder (pictures, read-mes, other formats) cannot.
_DECIDING = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")


class SentenceTransformerModel:
    """A `SentenceTransformer` as a contender. See `unmask.evaluate.models.embedding_model.EmbeddingModel`.

    A model that was published with prompts for queries and documents gets its own, as its authors meant it: the
    query's wherever a task gives an instruction, the document's elsewhere.
    """

    kind: Literal["sentence-transformers"] = "sentence-transformers"

    def __init__(self, model: Any, folder: Path, name: str) -> None:
        self.name = name
        self._model = model
        prompts: dict[str, str] = model.prompts or {}
        self._query = prompts.get("query") or ""
        self._document = next((prompts[key] for key in ("document", "passage") if prompts.get(key)), "")
        self.takes_instructions = bool(self._query or self._document)
        self.dimensions = int(model.get_embedding_dimension())
        self.parameters: int | None = sum(parameter.numel() for parameter in model.parameters())
        self.revision = _folder_digest(folder)

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """float32 [n, dimensions]. The instruction chooses the model's own prompt and is not read itself."""
        prompt = self._query if instruction else self._document
        return self._model.encode(list(texts), prompt=prompt or None, convert_to_numpy=True, show_progress_bar=False)

    def encode_with_prompt(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """Vectors of texts with any prompt before each, as a teacher is asked; float32 [n, dimensions]."""
        return self._model.encode(list(texts), prompt=prompt, convert_to_numpy=True, show_progress_bar=False)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Tokens after truncation, without padding."""
        prompt = self._query if instruction else self._document
        read = self._model.tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=self._model.max_seq_length
        )
        return sum(len(ids) for ids in read["input_ids"])


def open_folder(options: Options) -> SentenceTransformerModel:
    """Load a sentence-transformers folder.

    Raises:
        UsageError: the package is not installed.
        CheckpointError: the folder is not one of that library.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingPackages("a sentence-transformers model needs", "evaluate") from error
    folder = Path(options.target).expanduser()
    if not (folder / "modules.json").is_file():
        raise CheckpointError(f"{folder} is not a sentence-transformers folder: it has no modules.json")
    try:
        model = SentenceTransformer(str(folder), device=options.one("device") or "cpu", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return SentenceTransformerModel(model, folder, shown_name(options))


def _folder_digest(folder: Path) -> str:
    """16 hex digits over the names and contents of the folder's deciding files."""
    files = sorted({file for pattern in _DECIDING for file in folder.rglob(pattern)})
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()[:16]
