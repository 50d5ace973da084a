"""Static models: one vector per token, averaged. A transformer has to beat them by enough to be worth its cost."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.errors import MissingPackages, UsageError
from unmask.evaluate.models.specification import ModelSpecification

_DEFAULT_CONFIG = "l2_supercat"


class StaticModel:
    """A WordLlama model as an `EmbeddingModel`."""

    kind: Literal["static"] = "static"
    takes_instructions = False

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model
        table: np.ndarray = model.embedding  # [vocabulary, dimensions]
        self.dimensions = int(table.shape[1])
        self.parameters: int | None = int(table.size)
        digest = hashlib.sha256(np.ascontiguousarray(table).tobytes())
        digest.update(model.tokenizer.to_str().encode())
        self.revision = digest.hexdigest()[:16]

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return the mean of the tokens' vectors, float32 [n, dimensions]."""
        return np.asarray(self._model.embed(list(texts), norm=False), dtype=np.float32)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens whose vectors are averaged."""
        return sum(sum(encoding.attention_mask) for encoding in self._model.tokenize(list(texts)))


def open_static(specification: ModelSpecification) -> StaticModel:
    """Load a WordLlama configuration. `default` is the one inside the wordllama package, so it needs no network.

    Raises:
        UsageError: the package is not installed, or has no such configuration.
    """
    try:
        import wordllama
    except ImportError as error:
        raise MissingPackages("a wordllama model needs", "evaluate") from error
    dimensions = specification.number("dim") or 256
    is_default = specification.target == "default"
    try:
        if is_default:
            model = _load_packaged(Path(wordllama.__file__).parent, dimensions)
        else:
            model = wordllama.WordLlama.load(specification.target, dim=dimensions)
    except (AttributeError, ValueError, OSError) as error:
        raise UsageError(f"wordllama:{specification.target}?dim={dimensions} cannot be loaded: {error}") from error
    config = _DEFAULT_CONFIG if is_default else specification.target
    return StaticModel(model, specification.one("name") or f"wordllama-{config}-{dimensions}")


def _load_packaged(package: Path, dimensions: int) -> Any:
    """Load the model whose files lie inside the package; its own loader looks for the tokenizer in another folder.

    Fewer dimensions than the file's are its first ones: the model was trained for that.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from wordllama.inference import WordLlamaInference

    table = load_file(package / "weights" / f"{_DEFAULT_CONFIG}_256.safetensors")["embedding.weight"]
    if not 1 <= dimensions <= table.shape[1]:
        raise ValueError(f"it has 1 to {table.shape[1]} dimensions")
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / f"{_DEFAULT_CONFIG}_tokenizer_config.json"))
    return WordLlamaInference(table[:, :dimensions], tokenizer)
