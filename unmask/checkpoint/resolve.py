"""Resolve a model's name to local paths: shipped, local, mirrored under UNMASK_HOME, or on the hub."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unmask.checkpoint.adapter_config import AdapterConfig
from unmask.checkpoint.shipped import SHIPPED, fetch_shipped
from unmask.errors import CheckpointError, ModelNotFound
from unmask.home import home

# Key in the `config.json` of a folder that holds layers alone: the model that lends token embedding and tokenizer.
EMBEDDING_FROM = "token_embedding_from"

# The published LLM2Vec adapters of the second stage were trained on (base + this adapter), but their own
# adapter_config.json may name the base alone. https://github.com/McGill-NLP/llm2vec, "Getting Started".
TRAINED_ON = {
    f"McGill-NLP/LLM2Vec-{base}-mntp-{stage}": f"McGill-NLP/LLM2Vec-{base}-mntp"
    for base in ("Sheared-LLaMA", "Llama-2-7b-chat-hf", "Mistral-7B-Instruct-v2", "Meta-Llama-3-8B-Instruct")
    for stage in ("supervised", "unsup-simcse")
} | {
    f"McGill-NLP/LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-{stage}": "McGill-NLP/LLM2Vec-Meta-Llama-31-8B-Instruct-mntp"
    for stage in ("supervised", "unsup-simcse")
}


# Names that begin like this are this package's own. The hub is not asked for them.
_SHIPPED_UNDER = "unmask/"


@dataclass(frozen=True)
class Location:
    """Local paths of one model.

    Attributes:
        name: the name that the caller gave.
        base: a folder in the hub's layout, or a `.gguf` file.
        adapters: adapter folders, in merging order.
        trained_as: hub name of the base, or its path.
        embedding: the model that gives token embedding and tokenizer, where `base` is a folder without them.
    """

    name: str
    base: Path
    adapters: tuple[Path, ...]
    trained_as: str
    embedding: "Location | None" = None


def resolve(model: str | Path, adapters: Sequence[str | Path] = (), *, weights: bool = True) -> Location:
    """Find the files of `model`, following an adapter's configuration down to its base.

    Args:
        model, adapters: as for `open_checkpoint`.
        weights: fetch the weights as well, if the model has to be fetched from the hub.

    Raises:
        ModelNotFound: a name in the chain is neither local nor fetchable.
        CheckpointError: the chain of adapters does not end at a model.
    """
    location = _follow(str(model), (), weights)
    added = tuple(_adapter_folder(str(adapter), weights) for adapter in adapters)
    return replace(location, name=str(model), adapters=location.adapters + added)


def _follow(name: str, seen: tuple[str, ...], weights: bool) -> Location:
    if name in seen:
        raise CheckpointError(
            f"the adapters {' -> '.join((*seen, name))} name each other as their base; no model is left"
        )
    path = local_path(name, weights=weights)
    if name in SHIPPED:
        shipped = SHIPPED[name]
        if shipped.layers_folder is not None:
            return Location(name, shipped.layers_folder, (), shipped.trained_as, Location(name, path, (), name))
        return Location(name, path, (shipped.adapter,) if shipped.adapter else (), shipped.trained_as)
    if path.is_file() or not (path / "adapter_config.json").is_file():
        below = _embedding_source(path)
        if below is None:
            return Location(name, path, (), _name_of(name, path))
        source = _follow(below, (*seen, name), weights)
        return Location(name, path, (), source.trained_as, source)
    config = AdapterConfig.read(path)
    base = config.base
    if (path / "config.json").is_file() and _holds_weights(path):
        # A full model that also keeps its adapter's files: transformers would load the weights and then the adapter.
        return Location(name, path, (path,), _name_of(name, path))
    first_stage = TRAINED_ON.get(name) or TRAINED_ON.get(published_name(path))
    if first_stage is not None and base not in (None, first_stage):
        base = first_stage
    if not base:
        raise CheckpointError(f"{path / 'adapter_config.json'} does not name its base model (base_model_name_or_path)")
    # Inside the adapter's own folder, or beside it in a mirror of the hub, where folders are organisation/model.
    beside = next((folder for folder in (path / base, path.parent.parent / base) if folder.is_dir()), None)
    below = _follow(str(beside or base), (*seen, name), weights)
    return replace(below, adapters=(*below.adapters, path))


def _embedding_source(path: Path) -> str | None:
    """Return the model that a folder with only layers names for its token embedding and tokenizer."""
    file = path / "config.json"
    if not file.is_file() or (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file():
        return None
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get(EMBEDDING_FROM)
    except (OSError, ValueError, AttributeError):
        return None  # the reader of the configuration reports the fault
    if not isinstance(named, str):
        return None
    beside = path / named
    return str(beside) if beside.exists() else named


def _holds_weights(path: Path) -> bool:
    return any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))


def _name_of(name: str, path: Path) -> str:
    """Return the hub name by which a model was asked for, or its absolute path: `runs/best` may be either."""
    return str(path) if Path(name).expanduser().exists() else name


def published_name(path: Path) -> str:
    """Return `<org>/<name>` from the last two folders of a mirror, or from the hub's cache.

    >>> published_name(Path("/mirror/org/name")), published_name(Path("/hub/models--org--name/snapshots/1f0a"))
    ('org/name', 'org/name')
    """
    cached = path.parts[-3] if path.parts[-2:-1] == ("snapshots",) and len(path.parts) > 2 else ""
    if cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return "/".join(path.parts[-2:])


def is_hub_id(name: object) -> bool:
    """True for `<org>/<name>`.

    >>> is_hub_id("org/name-1.5"), is_hub_id("./name"), is_hub_id("/a/b"), is_hub_id(None)
    (True, False, False, False)
    """
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def _adapter_folder(name: str, weights: bool) -> Path:
    path = local_path(name, weights=weights)
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{name} is not an adapter: {path} has no adapter_config.json")
    return path


def local_path(name: str, *, weights: bool = True) -> Path:
    """Return the local path of a model's files. Downloads them if necessary, without `weights` only the small ones.

    Order: shipped models, an existing path, `UNMASK_HOME/models/<name>`, the hub (its cache first when offline). A
    name under `unmask/` is never looked for on the hub.
    """
    if name in SHIPPED:
        return fetch_shipped(name)
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise CheckpointError(f"{path} is not a model: it has neither config.json nor adapter_config.json")
        return path.absolute()
    mirrored = home() / "models" / name
    if not path.is_absolute() and mirrored.is_dir():
        return mirrored
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or name.endswith(".gguf"):
        raise ModelNotFound(
            f"no model at {name}: expected a folder with config.json, a .gguf file, or a hub id like org/name"
        )
    if name.startswith(_SHIPPED_UNDER):
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.0)[0]
        raise ModelNotFound(
            f"no model {name} ships with unmask; did you mean {near}? Shipped: {', '.join(SHIPPED)}. A folder of your "
            f"own under this name would be {mirrored}"
        )
    return _fetch_from_hub(name, weights)


def _pickles_of(folder: Path) -> list[str]:
    """Patterns for the `.bin` files of a fetched model whose parts came without safetensors.

    Args:
        folder: holds the model's JSON files and safetensors.
    """
    patterns = [] if any(folder.glob("*.safetensors")) else ["pytorch_model*.bin", "adapter_model.bin"]
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [str(module.get("path") or "") for module in modules]
    except (OSError, ValueError, AttributeError, TypeError):
        return patterns  # there is none, or whoever reads it says what is wrong with it
    with_weights = [path for path in paths if path and ".." not in path and (folder / path / "config.json").is_file()]
    bare = [path for path in with_weights if not any((folder / path).glob("*.safetensors"))]
    return patterns + [f"{path}/pytorch_model*.bin" for path in bare]


def _fetch_from_hub(repo: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # Small files first: they say whether there is anything to load. Each call falls back to the cache by itself
        # when the hub cannot be reached or HF_HUB_OFFLINE is set.
        folder = Path(snapshot_download(repo, allow_patterns=["*.json", "tokenizer.model"]))
        if weights:
            snapshot_download(repo, allow_patterns=["*.safetensors"])
            if pickles := _pickles_of(folder):
                snapshot_download(repo, allow_patterns=pickles)
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repo} is gated on the hub: accept its licence there and set HF_TOKEN to a token that may read it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {repo} that this machine may read") from error
    except HFValidationError as error:
        raise ModelNotFound(f"{repo!r} is neither a local path nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{repo} is not in the local hub cache and the hub cannot be reached; "
            f"connect once, or put its folder under {home() / 'models' / repo}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"the hub refused {repo}: {error}") from error
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelNotFound(f"{repo} on the hub is not a model: it has neither config.json nor adapter_config.json")
    return folder
