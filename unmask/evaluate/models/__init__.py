"""Contenders by name: what a model's specification says, and the file that opens its kind.

A specification is a target, and after it options as in an address: `TARGET[?option=value&option=value]`.

    target                                      kind                    options
    ------------------------------------------  ----------------------  ------------------------------------------
    unmask/smollm2-135m-embed, org/name,        unmask                  adapter (may be repeated), pooling, causal,
    a folder, a .gguf file                                              dtype, compat, max_length, device,
                                                                        instructions
    st:FOLDER, or a folder with modules.json    sentence-transformers   device
    http://host/v1#model                        endpoint                key (name of an environment variable),
                                                                        instructions
    wordllama:default, wordllama:CONFIG         static                  dim

Every kind takes `name`, which is what reports call it, and `dimensions`, which cuts its vectors short. An option
without a value is switched on: `?causal`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from unmask.errors import UsageError
from unmask.evaluate.models.embedding_model import EmbeddingModel, TruncatedModel

__all__ = ["Options", "open_model"]


@dataclass(frozen=True)
class Options:
    """The options of one specification, read by the kind that they are for.

    Attributes:
        target: the specification without its options.
        values: option -> its values, in the order given.
        defaults: what the whole run says of this kind's options.
    """

    target: str
    values: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, str]

    def all(self, option: str) -> tuple[str, ...]:
        """Every value given for an option that may be repeated."""
        return self.values.get(option, ())

    def one(self, option: str, otherwise: str | None = None) -> str | None:
        """The value of an option: of the specification, else of the whole run, else `otherwise`."""
        given = self.values.get(option)
        if given and len(given) > 1:
            raise UsageError(f"{self.target}: option {option!r} is given {len(given)} times; it takes one value")
        return given[0] if given else self.defaults.get(option, otherwise)

    def flag(self, option: str) -> bool:
        """Whether an option without a value is switched on."""
        value = self.one(option, "false")
        if value not in ("", "true", "false"):
            raise UsageError(f"{self.target}: {option}={value!r}; write {option}, {option}=true or {option}=false")
        return value != "false"

    def number(self, option: str) -> int | None:
        """A whole number, where one is given."""
        value = self.one(option)
        if value is None:
            return None
        if not value.isdigit():
            raise UsageError(f"{self.target}: {option}={value!r}; expected a whole number")
        return int(value)


def open_model(specification: str, defaults: Mapping[str, str] | None = None) -> EmbeddingModel:
    """Load what a specification names; see the top of this file for how one is written.

    Args:
        specification: for example `unmask/smollm2-135m-embed?causal&name=uni`.
        defaults: options for every contender whose kind knows them, such as dtype and device.

    Raises:
        UsageError: the specification is not understood, an option does not exist, or a package is missing.
        CheckpointError: the model's files cannot be used.
    """
    target, _, query = specification.partition("?")
    if not target:
        raise UsageError(f"{specification!r} names no model")
    kind, target = _kind(target)
    given: dict[str, tuple[str, ...]] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        given[option] = (*given.get(option, ()), value)
    known = (*_KINDS[kind].options, "name", "dimensions")
    unknown = [option for option in given if option not in known]
    if unknown:
        raise UsageError(f"{specification}: a {kind} model has no option {unknown[0]!r}; it has {', '.join(known)}")
    if query and not given:
        raise UsageError(f"{specification}: {query!r} is not a list of options; write ?option=value&option=value")
    options = Options(target, given, {k: v for k, v in (defaults or {}).items() if k in known})
    contender, dimensions = _KINDS[kind].open(options), options.number("dimensions")
    return contender if dimensions is None else TruncatedModel(contender, dimensions)


def _kind(target: str) -> tuple[str, str]:
    """The kind of a target, and the target without the prefix that says so."""
    head, colon, rest = target.partition(":")
    if head in ("http", "https"):
        return "endpoint", target
    if head == "st" and colon:
        return "sentence-transformers", rest
    if head == "wordllama" and colon:
        return "static", rest
    if (Path(target).expanduser() / "modules.json").is_file():
        return "sentence-transformers", target
    if colon and "/" not in head and "\\" not in rest and not Path(target).exists():
        raise UsageError(
            f"{target}: no kind of model is called {head!r}; write st:FOLDER, wordllama:default, "
            "http://host/v1#model, or the id, folder or .gguf file of a decoder"
        )
    return "unmask", target


def shown_name(options: Options) -> str:
    """What reports call a model: its `name`, else its id, else the last part of its path."""
    given = options.one("name")
    if given:
        return given
    path = Path(options.target).expanduser()
    return path.absolute().name.removesuffix(".gguf") if path.exists() else options.target


@dataclass(frozen=True)
class _Kind:
    options: tuple[str, ...]
    open: Callable[[Options], EmbeddingModel]


# Each opener imports its own packages: a run over one kind needs none of the others'.
def _unmask(options: Options) -> EmbeddingModel:
    from unmask.evaluate.models.decoder import open_decoder

    return open_decoder(options)


def _sentence_transformers(options: Options) -> EmbeddingModel:
    from unmask.evaluate.models.sentence_transformers import open_folder

    return open_folder(options)


def _endpoint(options: Options) -> EmbeddingModel:
    from unmask.evaluate.models.endpoint import open_endpoint

    return open_endpoint(options)


def _static(options: Options) -> EmbeddingModel:
    from unmask.evaluate.models.static import open_static

    return open_static(options)


_KINDS = {
    "unmask": _Kind(
        ("adapter", "pooling", "causal", "dtype", "compat", "max_length", "device", "instructions"), _unmask
    ),
    "sentence-transformers": _Kind(("device",), _sentence_transformers),
    "endpoint": _Kind(("key", "instructions"), _endpoint),
    "static": _Kind(("dim",), _static),
}
