"""Messages of values that msgspec refuses, with the valid choices."""

import re
from typing import Any

import msgspec
from msgspec import inspect

# An unknown choice is quoted up to here; it may be a whole text.
_MAX_QUOTE = 60
_UNKNOWN_CHOICE = re.compile(
    r"(?P<start>Invalid enum value )(?P<value>.*?)(?P<path> - at `\$(?P<steps>.*)`)?", re.DOTALL
)
_STEP = re.compile(r"\.(?P<field>[^.\[\]]+)|\[[^\]]*\]")


def validation_message(error: msgspec.MsgspecError, type_: Any) -> str:
    """Return msgspec's message with the valid choices, which it leaves out.

    >>> from typing import Literal
    >>> try:
    ...     msgspec.convert({"precision": "int4"}, dict[str, Literal["float32", "int8"]])
    ... except msgspec.ValidationError as error:
    ...     print(validation_message(error, dict[str, Literal["float32", "int8"]]))
    Invalid enum value 'int4', expected 'float32' or 'int8' - at `$[...]`

    Args:
        error: raised when a value was decoded or converted to `type_`.
        type_: the type of the whole value.
    """
    match = _UNKNOWN_CHOICE.fullmatch(str(error))
    if match is None:
        return str(error)
    parts = [inspect.type_info(type_)]
    for step in _STEP.finditer(match["steps"] or ""):
        parts = [below for part in parts for below in _parts_below(part, step["field"])]
    choices = [repr(choice) for part in parts for choice in _choices_of(part) if choice != ""]
    value = match["value"]
    if len(value) > _MAX_QUOTE:
        value = f"{value[:_MAX_QUOTE]}…"
    expected = f", expected {' or '.join(filter(None, [', '.join(choices[:-1]), choices[-1]]))}" if choices else ""
    return f"{match['start']}{value}{expected}{match['path'] or ''}"


def _members(part: inspect.Type) -> list[inspect.Type]:
    """Return the types that a type stands for: those of a union, and those below annotations."""
    if isinstance(part, inspect.Metadata):
        return _members(part.type)
    if isinstance(part, inspect.UnionType):
        return [member for each in part.types for member in _members(each)]
    return [part]


def _parts_below(part: inspect.Type, field: str | None) -> list[inspect.Type]:
    """Return the types of a field, or of the items where `field` is None."""
    below: list[inspect.Type] = []
    for member in _members(part):
        if isinstance(member, inspect.StructType | inspect.DataclassType):
            below += [each.type for each in member.fields if each.encode_name == field]
        elif field is None and isinstance(member, inspect.CollectionType):
            below.append(member.item_type)
        elif field is None and isinstance(member, inspect.TupleType):
            below += member.item_types
        elif field is None and isinstance(member, inspect.DictType):
            below.append(member.value_type)
    return below


def _choices_of(part: inspect.Type) -> list[Any]:
    choices: list[Any] = []
    for member in _members(part):
        if isinstance(member, inspect.LiteralType):
            choices += member.values
        elif isinstance(member, inspect.EnumType):
            choices += [each.value for each in member.cls]
    return choices
