"""Read a recipe from its TOML file. `--set optimiser.lr=1e-4` overrides one value by its path."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from unmask.errors import UsageError
from unmask.training.recipe import Recipe
from unmask.validation import validation_message

# Tables of a file that trains in several stages; see `training.stages`.
STAGES = "stages"


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides, whose values are TOML (a bare word is a string).

    Raises:
        UsageError: the file is not there, is not TOML, has stages, or a field is unknown or has a wrong value.
    """
    table = read_toml(path)
    if STAGES in table:
        raise UsageError(f"{path} has stages; `unmask train` runs them, and nothing else reads such a file")
    return recipe_of_table(table, str(path), overrides)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: it is not there or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"no recipe at {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def recipe_of_table(table: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a table as TOML gives it, after overrides.

    Args:
        origin: file, and stage where there are several, for messages.

    Raises:
        UsageError: a field is unknown or has a wrong value.
    """
    for override in overrides:
        _set(table, override)
    for optional in ("lora", "layers", "distillation", "decontaminate_against", "head", "ema"):
        if table.get(optional) is False:  # TOML has no null
            table[optional] = None
    infinite = next(_infinite_numbers(table), None)
    if infinite is not None:
        raise UsageError(f"{origin}: Expected a finite number, got {infinite}")
    try:
        return msgspec.convert(table, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(f"{origin}: {validation_message(error, Recipe)}") from error


def _infinite_numbers(value: Any, path: str = "$") -> Iterator[str]:
    """Yield value and path of each infinity and NaN, which TOML can write and no field can use, in msgspec's words."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{value} - at `{path}`"
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _infinite_numbers(below, f"{path}.{key}")
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _infinite_numbers(below, f"{path}[{number}]")


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override}: write key=value, as in optimiser.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place: Any = raw
    for part in path:
        if isinstance(place, list):
            place = _named(place, part, override)
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            break
    if not isinstance(place, dict):
        raise UsageError(f"--set {override}: {'.'.join(path)} is not a table")
    place[last] = value


def _named(entries: list[Any], name: str, override: str) -> Any:
    # `data.nli.limit=100`: an entry of a list of tables goes by its name.
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == name:
            return entry
    raise UsageError(f"--set {override}: nothing is named {name!r} there")
