"""One model's files, opened and checked: `open_checkpoint` is the entry of this package."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.checkpoint.adapter import Adapter, MergedTensors
from unmask.checkpoint.adapter_config import AdapterConfig
from unmask.checkpoint.digest import file_sha256
from unmask.checkpoint.gguf import open_gguf
from unmask.checkpoint.head import HEAD_FILE, HeadTensors, read_head_file
from unmask.checkpoint.hub_config import with_class_numbers
from unmask.checkpoint.modules import (
    BIDIRECTIONAL_TYPES,
    ModulesDescription,
    describe_bidirectional_type,
    read_dense_layers,
    read_modules,
)
from unmask.checkpoint.resolve import Location, is_hub_id, resolve
from unmask.checkpoint.tensors import (
    EMBEDDING,
    UNQUANTISED,
    AbsentTensors,
    BorrowedEmbedding,
    FiniteTensors,
    TensorSource,
    further_weights,
    open_tensors,
)
from unmask.checkpoint.tokenizer import TOKENIZER_FILES, TextTokenizer, read_tokenizer, special_tokens_files
from unmask.errors import CheckpointError, StorageError

# Entries of a config.json by which transformers and others quantise; MLX writes the last.
_QUANTISATIONS = ("quantization_config", "compression_config", "quantization")
# Keys of a multimodal config.json that count for its decoder too.
_WHOLE_MODEL_KEYS = (
    *("auto_map", "is_causal", "use_bidirectional_attention", "matryoshka_dimensions", "pooling"),
    *_QUANTISATIONS,
)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a model's files, before anything is computed.

    Attributes:
        name: the id or path it was asked for by.
        config: the architecture, in the words of the hub's `config.json` (a GGUF header is translated).
        tensors: weights by innermost name, adapters already merged in.
        tokenizer: the model's own.
        encoder_config: `llm2vec_config.json` where there is one (pooling_mode, max_length, ...), else `modules.json` or
            a GGUF file's own settings in the same words, else empty.
        trained_as: the hub name of the decoder it began as, or a path; chat templates are kept under it.
        files: every file that decides a vector.
        tokenizer_folder: the folder of the tokenizer's files; None for a GGUF file.
        layers: the layers of the files that are left (`encoder.shear`); None for all.
    """

    name: str
    config: Mapping[str, Any]
    tensors: TensorSource
    tokenizer: TextTokenizer
    encoder_config: Mapping[str, Any]
    trained_as: str
    files: tuple[Path, ...]
    tokenizer_folder: Path | None
    layers: tuple[int, ...] | None = None

    @cached_property
    def revision(self) -> str:
        """Content address of the weights: 16 hex digits over all files' SHA-256, in merging order.

        Raises:
            CheckpointError: the model was opened without its weights.
        """
        if isinstance(self.tensors, AbsentTensors):
            raise CheckpointError(f"{self.name} was opened without its weights, so it has no revision")
        return self._content_address()

    def require_unchanged(self) -> None:
        """Check that the files are still those of `revision`: they may be replaced while a model loads.

        A no-op if nobody has asked for the revision: of a large model it takes seconds.

        Raises:
            CheckpointError: they have other contents.
        """
        if "revision" in vars(self) and self._content_address() != self.revision:
            raise CheckpointError(f"{self.name}: its files have changed while they were read; load it again")

    def _content_address(self) -> str:
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(file_sha256(file))
        if self.layers is not None:
            whole.update(repr(self.layers).encode())
        return whole.hexdigest()[:16]


def open_checkpoint(model: str | Path, adapters: Sequence[str | Path] = (), *, weights: bool = True) -> Checkpoint:
    """Find a model and its adapters by name, read their headers and check that they fit together.

    Args:
        model: `unmask/smollm2-embed-6l`, a hub id, a folder in the hub's layout, or a `.gguf` file. Naming an
            adapter is enough: its base, and the adapters it was trained on top of, are found from it.
        adapters: further LoRA adapters, merged in this order after those.
        weights: False opens tokenizer, configuration and settings alone, of a folder that may have no weights, and
            fetches nothing else. Whoever then uses `tensors` or `revision` gets a CheckpointError.

    Raises:
        ModelNotFound: nothing of that name is here or can be fetched.
        CheckpointError: a file is damaged, or the files do not fit each other.
        StorageError: a file is there but cannot be read.
    """
    location = resolve(model, adapters, weights=weights)
    try:
        return _open(location, weights)
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or location.base}: {error.strerror or error}") from error


def _open(location: Location, weights: bool) -> Checkpoint:
    base = location.base
    gguf_settings: Mapping[str, Any] = {}
    if base.is_file():
        config, tensors, tokenizer, gguf_settings = open_gguf(base)
        files, tokenizer_folder = [base], None
    elif location.embedding is not None:
        config = _read_config(base)
        below = _open(location.embedding, weights)
        tensors, tokenizer = _tensors(location, weights, below.tensors), below.tokenizer
        files, tokenizer_folder = [*_deciding_files(base, weights), *below.files], below.tokenizer_folder
    else:
        config = _read_config(base)
        if weights:
            _require_unquantised_config(config, base)
        tensors, tokenizer = _tensors(location, weights), read_tokenizer(base)
        files, tokenizer_folder = _deciding_files(base, weights, tokenizer), base
    merged = [Adapter(path) for path in location.adapters] if weights else []
    for adapter in merged:
        files += [adapter.folder / "adapter_config.json", adapter.weights_file]
        files += sorted(adapter.folder.glob("llm2vec_config.json"))
    if merged:
        tensors = MergedTensors(tensors, merged)
    if location.adapters:
        own = _adapter_tokenizer(location.adapters, tokenizer, tokenizer_folder)
        if own is not None:
            tokenizer, tokenizer_folder = own
            files += _tokenizer_files(tokenizer_folder, tokenizer)
    outermost_first = [path for path in (*reversed(location.adapters), base) if path.is_dir()]
    described = _description(outermost_first, config, weights) or ModulesDescription(gguf_settings)
    files += described.files
    # The outermost head counts: it was trained on what lies below it.
    head = next((file for path in outermost_first if (file := path / HEAD_FILE).is_file()), None)
    if head is not None:
        files.append(head)
    if weights and (layers := described.layers if head is None else read_head_file(head)):
        tensors = HeadTensors(tensors, layers)
    tokenizer = _with_sequence_tokens(tokenizer, described.settings)
    config = {**config, "model_type": BIDIRECTIONAL_TYPES.get(config["model_type"], config["model_type"])}
    if weights:
        _check_vocabulary(location.name, tensors, tokenizer)
        tensors = FiniteTensors(tensors, location.name)
    if merged or (weights and "vocab_size" not in config):
        config["vocab_size"] = tensors.shape(EMBEDDING)[0]  # an adapter may bring an embedding of its own size
    return Checkpoint(
        name=location.name,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        encoder_config=described.settings,
        trained_as=_trained_as(location, config),
        files=tuple(files),
        tokenizer_folder=tokenizer_folder,
    )


def _trained_as(location: Location, config: Mapping[str, Any]) -> str:
    """Return the hub name of the decoder a model began as, by whatever path its files are loaded; else that path.

    LLM2Vec too takes `_name_or_path` where a model is a local folder; its adapters bring a config.json for that.
    """
    if is_hub_id(config.get("_name_or_path")):
        return str(config["_name_or_path"])
    if not Path(location.trained_as).is_absolute():
        return location.trained_as
    named = [_read_json(folder / "config.json").get("_name_or_path") for folder in location.adapters]
    named += [AdapterConfig.read(folder).base for folder in location.adapters[:1]]
    return next((str(name) for name in named if is_hub_id(name)), location.trained_as)


def _tensors(location: Location, weights: bool, embedding: TensorSource | None = None) -> TensorSource:
    """Open the weights of a folder, with the token embedding of another model where they lack one."""
    if not weights:
        return AbsentTensors(location.name)
    tensors = open_tensors(location.base)
    return tensors if embedding is None else BorrowedEmbedding(tensors, embedding)


def _with_sequence_tokens(tokenizer: TextTokenizer, settings: Mapping[str, Any]) -> TextTokenizer:
    """Replace the ids around a sequence by those of "sequence_tokens", [before, after], in the encoder's settings.

    The tokenizer of an exported folder adds a template's special tokens too, for libraries that know no templates.

    Raises:
        CheckpointError: the setting is not two lists of ids.
    """
    around = settings.get("sequence_tokens")
    if around is None:
        return tokenizer
    try:
        prefix, suffix = (tuple(map(int, ids)) for ids in around)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"sequence_tokens is {around!r:.80}; expected two lists of token ids") from error
    return replace(tokenizer, prefix=prefix, suffix=suffix)


def _description(folders: Sequence[Path], config: Mapping[str, Any], weights: bool) -> ModulesDescription | None:
    """The outermost description of the encoder: an `llm2vec_config.json` or `modules.json`, else the decoder's type.

    Args:
        folders: the outermost first: the last adapter's, ..., the base's.
        config: the decoder's `config.json`.
        weights: open the layers behind the pooling.
    """
    for i, folder in enumerate(folders):
        settings = _read_json(folder / "llm2vec_config.json")
        if settings:
            # Training carries the steps of a head on to its adapter; the layers stay in the base's folder.
            dense = any(step.get("kind") == "dense" for step in settings.get("head") or ())
            dense = dense and not (folder / HEAD_FILE).is_file()  # that file holds the layers
            below = (read_dense_layers(path, config, weights=weights) for path in folders[i:]) if dense else ()
            carried = next((modules for modules in below if modules is not None), ModulesDescription({}))
            return ModulesDescription(settings, carried.files, carried.layers)
        modules = read_modules(folder, config, weights=weights)
        if modules is not None:
            return modules
    return describe_bidirectional_type(folders[-1], config) if folders else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type, so the architecture is unknown")
    # A multimodal file keeps its decoder's shape one level down.
    text = config.get("text_config")
    is_part = isinstance(text, dict)
    return with_class_numbers(_text_config(config, text, file) if is_part else config, is_part)


def _text_config(config: Mapping[str, Any], text: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the decoder's part of a multimodal config, with what the outer part says of the whole model.

    Raises:
        CheckpointError: the parts contradict each other.
    """
    joined = {"model_type": config["model_type"], **text, "_name_or_path": config.get("_name_or_path")}
    for key in _WHOLE_MODEL_KEYS:
        value, of_text = config.get(key), text.get(key)
        if isinstance(value, dict) and isinstance(of_text, dict):
            joined[key] = {**of_text, **value}
        elif None not in (value, of_text) and value != of_text:
            raise CheckpointError(
                f"{file}: {key} is {value!r:.80}, but {of_text!r:.80} in its text_config; remove the one that does not "
                "hold for this model"
            )
        elif value is not None:
            joined[key] = value
    return joined


def _require_unquantised_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse weights that another library would dequantise, or would quantise as it loads them."""
    for key in _QUANTISATIONS:
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} says that the weights are quantised ({method or settings!r:.60}), "
                f"which unmask does not compute. {UNQUANTISED}; where these weights are in one of those precisions and "
                f"were never meant to be quantised, remove {key}"
            )


def _deciding_files(folder: Path, weights: bool, tokenizer: TextTokenizer | None = None) -> list[Path]:
    """The files of a folder in the order of a revision.

    Args:
        folder: in the hub's layout.
        weights: the folder's weights are read.
        tokenizer: the folder's own; None where it has none.
    """
    usual = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    settings = [file for name in ("config.json", "llm2vec_config.json") for file in sorted(folder.glob(name))]
    further = further_weights(folder, usual) if weights else []
    return [*settings, *_tokenizer_files(folder, tokenizer), *usual, *further]


def _tokenizer_files(folder: Path, tokenizer: TextTokenizer | None) -> list[Path]:
    named = [] if tokenizer is None else special_tokens_files(folder, tokenizer)
    return [*sorted(folder.glob("tokenizer*.json")), *sorted(folder.glob("tokenizer.model")), *named]


def _adapter_tokenizer(
    adapters: Sequence[Path], of_base: TextTokenizer, base: Path | None
) -> tuple[TextTokenizer, Path] | None:
    """Read the tokenizer of the outermost adapter that has one, if it counts, not the base's.

    That is so if it has other tokens, as after `resize_token_embeddings`, or lies in a sentence-transformers folder,
    whose tokenizer that library reads. Else None: published LLM2Vec adapters come with copies of the base's.

    Args:
        of_base: the base's tokenizer.
        base: the folder that it lies in.
    """
    folder = next((path for path in reversed(adapters) if _own_tokenizer_file(path) is not None), None)
    if folder is None or folder == base:
        return None
    file, read_by_library = _own_tokenizer_file(folder), (folder / "modules.json").is_file()
    assert file is not None
    if not read_by_library and base is not None and _are_equal(file, base / file.name):
        return None
    own = read_tokenizer(folder)
    return (own, folder) if read_by_library or not own.has_tokens_of(of_base) else None


def _are_equal(file: Path, other: Path) -> bool:
    return other.is_file() and file_sha256(file) == file_sha256(other)


def _own_tokenizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def _read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _check_vocabulary(name: str, tensors: TensorSource, tokenizer: TextTokenizer) -> None:
    if EMBEDDING not in tensors.names():
        raise CheckpointError(f"{name} has no token embedding ({EMBEDDING}); it is not a decoder's checkpoint")
    rows = tensors.shape(EMBEDDING)[0]
    if tokenizer.highest_id >= rows:
        raise CheckpointError(
            f"{name}: the tokenizer produces ids up to {tokenizer.highest_id}, but the embedding has {rows} rows; "
            "the tokenizer belongs to another model"
        )
