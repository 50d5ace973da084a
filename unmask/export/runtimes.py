"""Other people's runtimes, each as one function from texts to vectors: the readers that parity is measured with.

A runtime reads the exported files alone. Where a file has no place for prompts, they are put before the texts as a
caller of that runtime would.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unmask.errors import CheckpointError, MissingPackages, UsageError
from unmask.evaluate.models.onnx_file import OnnxModel

RuntimeKind = Literal[
    "unmask",
    "sentence-transformers",
    "vLLM",
    "onnxruntime",
    "fastembed",
    "transformers.js",
    "llama.cpp",
    "endpoint",
]
# Use of a text: as `encode`, `encode_document` or `encode_query` of a client reads it.
TextUse = Literal["texts", "documents", "queries"]
PROMPT_NAMES: Mapping[TextUse, str] = {"documents": "document", "queries": "query"}


@dataclass(frozen=True)
class OtherRuntime:
    """A reader of exported files.

    Attributes:
        name: with its version.
        dtype: precision of the weights that it read.
        uses: uses of texts that it can be asked for.
        encode: (texts, use, texts in a batch) -> vectors, float32 [n, dimensions].
        truncates: it cuts texts that are too long, and does not refuse them.
        close: ends its connections.
    """

    kind: RuntimeKind
    name: str
    dtype: str
    uses: tuple[TextUse, ...]
    encode: Callable[[Sequence[str], TextUse, int], np.ndarray]
    truncates: bool = True
    close: Callable[[], None] = lambda: None


def open_runtimes(target: str, prompts: Mapping[TextUse, str], model_name: str = "") -> list[OtherRuntime]:
    """Open every runtime that reads a folder, a file or an endpoint.

    Args:
        target: folder, `.gguf` or `.onnx` file, or base URL of an OpenAI-compatible server.
        prompts: text before a text, for files that hold none.
        model_name: the model to ask an endpoint for.

    Raises:
        UsageError: nothing here reads it, or the packages of its runtime are missing.
        CheckpointError: its runtime refuses it.
    """
    if target.startswith(("http://", "https://")):
        return [_endpoint(target, model_name)]
    path = Path(target).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return [_llama_cpp(path, prompts)]
    if path.suffix == ".onnx" and path.is_file():
        return [_onnxruntime(path, prompts)]
    if not path.is_dir():
        raise UsageError(f"{target} is no folder, no .gguf or .onnx file and no URL; nothing to compare with")
    runtimes = [_onnxruntime(file, prompts) for file in sorted(path.glob("onnx/*.onnx"))]
    runtimes += [_llama_cpp(file, prompts) for file in sorted(path.glob("*.gguf"))]
    if (path / "modules.json").is_file():
        runtimes.insert(0, _sentence_transformers(path))
    if (path / "llm2vec_config.json").is_file():
        runtimes.insert(0, _unmask(path))
    if not runtimes:
        raise UsageError(
            f"{target} holds no modules.json, no onnx/*.onnx and no *.gguf: no runtime for embeddings reads it"
        )
    return runtimes


def _module(name: str, feature: str) -> Any:
    """Import a runtime's package; not by an import statement, for which a type checker would read all of it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackages(feature, "export") from error


def _stored_dtype(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _unmask(folder: Path) -> OtherRuntime:
    from unmask import __version__
    from unmask.encoder import Encoder

    encoder = Encoder.load(folder, dtype="float32")
    methods = {"texts": encoder.encode, "documents": encoder.encode_document, "queries": encoder.encode_query}

    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        vectors = [methods[use](texts[i : i + batch], normalize=True) for i in range(0, len(texts), batch)]
        return np.concatenate(vectors)

    return OtherRuntime(
        "unmask", f"unmask {__version__}", _stored_dtype(folder), ("texts", "documents", "queries"), encode
    )


def _sentence_transformers(folder: Path) -> OtherRuntime:
    library = _module("sentence_transformers", "a sentence-transformers folder is checked with")
    _module("transformers.utils.logging", "a sentence-transformers folder is checked with").disable_progress_bar()
    try:
        model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"sentence-transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    methods = {"texts": model.encode, "documents": model.encode_document, "queries": model.encode_query}

    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        vectors = methods[use](list(texts), batch_size=batch, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    name = f"sentence-transformers {version('sentence-transformers')}"
    uses: tuple[TextUse, ...] = ("texts", "documents", "queries")
    return OtherRuntime("sentence-transformers", name, _stored_dtype(folder), uses, encode)


def stored_prompts(file: Path, prompts: Mapping[TextUse, str]) -> Mapping[TextUse, str]:
    """Return the text before a text by its use, as stated beside an ONNX file; `prompts` where nothing is stated."""
    places = (folder / "config_sentence_transformers.json" for folder in (file.parent, file.parent.parent))
    stated = next((place for place in places if place.is_file()), None)
    if stated is None:
        return prompts
    settings = json.loads(stated.read_text(encoding="utf-8"))
    own = settings.get("prompts") or {}
    stored: dict[TextUse, str] = {use: str(own.get(name) or "") for use, name in PROMPT_NAMES.items()}
    return {**stored, "texts": str(own.get(settings.get("default_prompt_name") or "") or "")}


def _onnxruntime(file: Path, prompts: Mapping[TextUse, str]) -> OtherRuntime:
    """ONNX Runtime with the tokenizer beside the file, as TEI's ort backend runs it."""
    model = OnnxModel(file, file.name)
    before = stored_prompts(file, prompts)

    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        return model.encode_with_prompt(texts, before.get(use, ""), batch)

    name = f"{model.runtime} ({file.name})"
    return OtherRuntime("onnxruntime", name, model.precision, ("texts", "documents", "queries"), encode)


def _llama_cpp(file: Path, prompts: Mapping[TextUse, str]) -> OtherRuntime:
    """llama.cpp's server, whose code xllamacpp carries, with no flags that change pooling or mask."""
    library = _module("xllamacpp", "a GGUF file is checked with")
    from unmask.checkpoint.gguf import open_gguf

    config = open_gguf(file)[0]
    params = library.CommonParams()
    params.model.path = str(file)
    params.embedding, params.warmup, params.verbosity = True, False, -1
    params.n_ctx = params.n_batch = params.n_ubatch = int(config["max_position_embeddings"])
    # One thread: several wait for each other by spinning, which takes seconds on a busy machine.
    params.n_parallel = params.n_threads_http = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = library.Server(params)

    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        rows: list[list[float]] = []
        for start in range(0, len(texts), batch):
            inputs = [prompts.get(use, "") + text for text in texts[start : start + batch]]
            answer = server.handle_embeddings({"input": inputs, "model": file.stem})
            if "data" not in answer:
                raise CheckpointError(f"llama.cpp refuses a text for {file}: {answer!r:.200}")
            rows += [row["embedding"] for row in answer["data"]]
        return np.array(rows, dtype=np.float32)

    name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
    return OtherRuntime(
        "llama.cpp", name, _gguf_dtype(file), ("texts", "documents", "queries"), encode, truncates=False
    )


def _gguf_dtype(file: Path) -> str:
    """Precision of the most coarse matrix of a GGUF file."""
    from unmask.checkpoint.gguf import tensor_types

    kinds = tensor_types(file)
    return "q8" if "Q8_0" in kinds else "float16" if "F16" in kinds else "float32"


def _endpoint(url: str, model: str) -> OtherRuntime:
    """An OpenAI-compatible server. Queries are asked of the model id NAME:query, where the server lists it."""
    try:
        import httpx

        from unmask.evaluate.models.endpoint import EndpointModel
    except ImportError as error:
        raise MissingPackages("an endpoint is checked with", "evaluate") from error
    import os

    if not model:
        raise UsageError(f"{url} names no model: --model NAME")
    key, base = os.environ.get("OPENAI_API_KEY"), url.rstrip("/") + "/"
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        listed = httpx.get(f"{base}models", headers=headers, timeout=30).json()
        ids = {str(entry.get("id")) for entry in listed.get("data", ())}
    except (httpx.HTTPError, ValueError, AttributeError):
        ids = set()  # many servers list nothing
    models: dict[TextUse, str] = {"texts": model}
    models |= {use: f"{model}:{name}" for use, name in PROMPT_NAMES.items() if f"{model}:{name}" in ids}
    clients: dict[TextUse, EndpointModel] = {
        use: EndpointModel(base, name, key, name=name, takes_instructions=False) for use, name in models.items()
    }

    def encode(texts: Sequence[str], use: TextUse, batch: int) -> np.ndarray:
        return np.concatenate([clients[use].encode(texts[i : i + batch]) for i in range(0, len(texts), batch)])

    def close() -> None:
        for client in clients.values():
            client.close()

    name = f"{model} at {url}"
    return OtherRuntime("endpoint", name, "float32", tuple(clients), encode, truncates=False, close=close)
