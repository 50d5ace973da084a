"""Model specifications, as users write them: `TARGET[?option=value&option=value]`.

    target                                      kind                    options
    ------------------------------------------  ----------------------  ------------------------------------------
    unmask/smollm2-embed-6l, org/name,          unmask                  adapter (may be repeated), pooling, causal,
    a folder, a .gguf file,                                             dtype, compat, max_length, device,
    unmask:FOLDER with modules.json                                     instructions
    st:FOLDER, or a folder with modules.json    sentence-transformers   device, dtype (float32 or bfloat16)
    an .onnx file of `unmask export`            onnxruntime
    http://host/v1#model                        endpoint                key (name of an environment variable),
                                                                        instructions
    wordllama:default, wordllama:CONFIG         static                  dim

Every kind takes `name`, the name in reports, and `dimensions`, which truncates the vectors. An option without a value
is switched on: `?causal`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from unmask.errors import UsageError
from unmask.evaluate.models.embedding_model import ModelKind

OPTIONS: Mapping[ModelKind, tuple[str, ...]] = {
    "unmask": ("adapter", "pooling", "causal", "dtype", "compat", "max_length", "device", "instructions"),
    "sentence-transformers": ("device", "dtype"),
    "onnxruntime": (),
    "endpoint": ("key", "instructions"),
    "static": ("dim",),
}


@dataclass(frozen=True)
class ModelSpecification:
    """A parsed specification.

    Attributes:
        kind: library or service that runs the model.
        target: the specification without its options and without the prefix of its kind.
        values: option -> its values, in the order of the specification.
        defaults: values of the whole run for options of this kind.
    """

    kind: ModelKind
    target: str
    values: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, str]

    def all(self, option: str) -> tuple[str, ...]:
        """Return every value of an option that may be repeated."""
        return self.values.get(option, ())

    def one(self, option: str, default: str | None = None) -> str | None:
        """Return the value of an option: from the specification, else from the whole run, else `default`."""
        values = self.all(option)
        if len(values) > 1:
            raise UsageError(f"{self.target}: option {option!r} is given {len(values)} times; it takes one value")
        return values[0] if values else self.defaults.get(option, default)

    def flag(self, option: str) -> bool:
        """Return True if an option without a value is switched on."""
        value = self.one(option, "false")
        if value not in ("", "true", "false"):
            raise UsageError(f"{self.target}: {option}={value!r}; write {option}, {option}=true or {option}=false")
        return value != "false"

    def number(self, option: str, least: int = 1) -> int | None:
        """Return the value of an option as a whole number of at least `least`, None if it is absent."""
        value = self.one(option)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 19) or int(value) < least:
            raise UsageError(f"{self.target}: {option}={value[:40]!r}; expected a whole number of {least} or more")
        return int(value)

    @property
    def display_name(self) -> str:
        """Return the name in reports: option `name`, else the id, else the last part of the path."""
        name = self.one("name")
        if name:
            return name
        path = Path(self.target).expanduser()
        return path.absolute().name.removesuffix(".gguf") if path.exists() else self.target


def parse_specification(specification: str, defaults: Mapping[str, str] | None = None) -> ModelSpecification:
    """Parse a specification, for example `unmask/smollm2-embed-6l?causal&name=uni`.

    Args:
        defaults: option -> value for every model whose kind has the option, such as dtype and device.

    Raises:
        UsageError: it names no model, no kind has its prefix, or its kind has no such option.
    """
    target, _, query = specification.partition("?")
    if not target:
        raise UsageError(f"{specification!r} names no model")
    kind, target = _split_kind(target)
    values: dict[str, tuple[str, ...]] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        values[option] = (*values.get(option, ()), value)
    allowed = (*OPTIONS[kind], "name", "dimensions")
    unknown = [option for option in values if option not in allowed]
    if unknown:
        raise UsageError(f"{specification}: a {kind} model has no option {unknown[0]!r}; it has {', '.join(allowed)}")
    if query and not values:
        raise UsageError(f"{specification}: {query!r} is not a list of options; write ?option=value&option=value")
    return ModelSpecification(kind, target, values, {k: v for k, v in (defaults or {}).items() if k in allowed})


def _split_kind(target: str) -> tuple[ModelKind, str]:
    """Return the kind of a target, and the target without the prefix of the kind."""
    head, colon, rest = target.partition(":")
    if head in ("http", "https"):
        return "endpoint", target
    if head == "st" and colon:
        return "sentence-transformers", rest
    if head == "unmask" and colon:
        return "unmask", rest
    if head == "wordllama" and colon:
        return "static", rest
    if target.endswith(".onnx"):
        return "onnxruntime", target
    if (Path(target).expanduser() / "modules.json").is_file():
        return "sentence-transformers", target
    if colon and "/" not in head and "\\" not in rest and not Path(target).exists():
        raise UsageError(
            f"{target}: no kind of model is called {head!r}; write st:FOLDER, wordllama:default, "
            "http://host/v1#model, or the id, folder or .gguf file of a decoder"
        )
    return "unmask", target
