"""Static models: one vector per token, averaged. A transformer has to be worth what it costs above them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.errors import MissingPackages, UsageError
from unmask.evaluate.models import Options

_DEFAULT = "l2_supercat"


class StaticModel:
    """A WordLlama model as a contender. See `unmask.evaluate.models.embedding_model.EmbeddingModel`."""

    kind: Literal["static"] = "static"
    takes_instructions = False

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model
        table: np.ndarray = model.embedding  # [vocabulary, dimensions]
        self.dimensions = int(table.shape[1])
        self.parameters: int | None = int(table.size)
        whole = hashlib.sha256(np.ascontiguousarray(table).tobytes())
        whole.update(model.tokenizer.to_str().encode())
        self.revision = whole.hexdigest()[:16]

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """float32 [n, dimensions]: the mean of the tokens' vectors."""
        return np.asarray(self._model.embed(list(texts), norm=False), dtype=np.float32)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Tokens whose vectors are averaged."""
        return sum(sum(encoding.attention_mask) for encoding in self._model.tokenize(list(texts)))


def open_static(options: Options) -> StaticModel:
    """Load a WordLlama configuration; `default` is the one that its package carries, so it needs no network.

    Raises:
        UsageError: the package is not installed, or has no such configuration.
    """
    try:
        import wordllama
    except ImportError as error:
        raise MissingPackages("a wordllama model needs", "evaluate") from error
    dimensions = options.number("dim") or 256
    try:
        if options.target == "default":
            model = _carried(Path(wordllama.__file__).parent, dimensions)
        else:
            model = wordllama.WordLlama.load(options.target, dim=dimensions)
    except (AttributeError, ValueError, OSError) as error:
        raise UsageError(f"wordllama:{options.target}?dim={dimensions} cannot be loaded: {error}") from error
    config = _DEFAULT if options.target == "default" else options.target
    return StaticModel(model, options.one("name") or f"wordllama-{config}-{dimensions}")


def _carried(package: Path, dimensions: int) -> Any:
    """The model whose files the package carries. Its own loader looks for the tokenizer in a folder that is not there.

    Fewer dimensions than the file's are its first ones: the model was trained for that.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from wordllama.inference import WordLlamaInference

    table = load_file(package / "weights" / f"{_DEFAULT}_256.safetensors")["embedding.weight"]
    if not 1 <= dimensions <= table.shape[1]:
        raise ValueError(f"it has 1 to {table.shape[1]} dimensions")
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / f"{_DEFAULT}_tokenizer_config.json"))
    return WordLlamaInference(table[:, :dimensions], tokenizer)
