"""Forms: their fields as texts, numbers and amounts, and error messages as sentences."""

from collections.abc import Mapping

from unmask.accounts import money
from unmask.errors import UsageError


class Form:
    """Fields of a form that was sent; a field has one text or several."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def get(self, name: str) -> str:
        """Return the field without blanks around it; an empty text if it is missing."""
        return self.raw(name).strip()

    def raw(self, name: str) -> str:
        """Return the field exactly as it was typed, as passwords need it."""
        return self._fields.get(name, [""])[0]

    def all(self, name: str) -> list[str]:
        """Return every value of a field, such as ticked boxes."""
        return [value.strip() for value in self._fields.get(name, ()) if value.strip()]


def parse_whole_number(text: str, label: str) -> int | None:
    """Read a number greater than 0; None if nothing was typed.

    Args:
        text: may contain commas and spaces.
        label: names the field in the error message.

    Raises:
        UsageError: it is not a whole number greater than 0.
    """
    digits = text.replace(",", "").replace(" ", "")
    if not digits:
        return None
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 12 or int(digits) == 0:
        raise UsageError(f"{label}: {text[:40]!r} is no whole number greater than 0")
    return int(digits)


def parse_amount(text: str) -> int:
    """Read an amount of dollars. Returns nano-dollars.

    Raises:
        UsageError: it is not an amount.
    """
    try:
        return money.parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def sentence(error: Exception) -> str:
    """Write an error's message as a sentence, with a capital letter and a full stop."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
