"""Messages of validation: a wrong choice is answered with the right ones."""

import enum
from typing import Annotated, Any, Literal

import msgspec
import pytest

from unmask.validation import validation_message


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct):
    kind: Literal["tei", "openai"] = "tei"
    shade: Annotated[Literal["dark", "light", ""] | None, msgspec.Meta(description="of all")] = None
    level: Literal[1, 2] | Literal["most"] = 1


class Outer(msgspec.Struct):
    first: Inner | None = None
    several: tuple[Inner, ...] = ()
    named: dict[str, list[Inner]] = {}
    colour: Colour = Colour.RED
    own: str = msgspec.field(name="their", default="")
    pair: tuple[int, Literal["a", "b"]] = (1, "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"first": {"kind": "x"}}, "'x', expected 'openai' or 'tei' - at `$.first.kind`"),
        ({"several": [{}, {"shade": "x"}]}, "'x', expected 'dark' or 'light' - at `$.several[1].shade`"),
        ({"named": {"n": [{"level": 3}]}}, "3, expected 1, 2 or 'most' - at `$.named[...][0].level`"),
        ({"colour": "green"}, "'green', expected 'red' or 'blue' - at `$.colour`"),
        ({"pair": [1, "c"]}, "'c', expected 'a' or 'b' - at `$.pair[1]`"),
    ],
)
def test_the_message_has_the_choices_wherever_the_value_stands(value: Any, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.convert(value, Outer)
    assert validation_message(error.value, Outer) == f"Invalid enum value {message}"


def test_the_value_itself_may_be_the_choice_and_long() -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.convert("x" * 500, Literal["only"])
    assert validation_message(error.value, Literal["only"]) == f"Invalid enum value '{'x' * 59}…, expected 'only'"


def test_other_messages_stay_as_they_are() -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.convert({"first": {"kind": 3}}, Outer)
    assert validation_message(error.value, Outer) == str(error.value)
