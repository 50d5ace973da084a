"""Options that several commands share, and the amounts of money in them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import Parameter, Token

from unmask.cluster.options import ClusterOptions
from unmask.errors import UsageError

# Actor of the command line in the audit log and in the history of a model.
ACTOR = "command line"

THIS_PROCESS = ClusterOptions()  # no cluster

DeviceOption = Annotated[
    str,
    Parameter(
        name="--device",
        help="Torch device: cpu, or cuda with --dtype bfloat16. The CUDA code has not been run on a GPU yet.",
    ),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"],
    Parameter(
        name="--dtype",
        help="Precision of the weights. auto is the fastest here whose vectors of 64 texts stay within 1e-4 "
        "of float32 (1 - cosine); it is measured at the first load of a model and kept. Name float32 where several "
        "machines must give the same vectors. int8 has a cosine of about 0.9994 to float32, so auto never takes it.",
    ),
]
AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON, for scripts.")]


def _at_least_one(_: type, value: int) -> None:
    if value < 1:
        raise ValueError(f"{value} is less than 1")


LineCount = Annotated[int, Parameter(name="--lines", validator=_at_least_one)]
DayCount = Annotated[int, Parameter(name="--days", validator=_at_least_one)]


def amount_option(*, zero: bool = False) -> Parameter:
    """Return the converter of an option with an amount of dollars, see `parse_amount`."""

    def convert(_: type, tokens: Sequence[Token]) -> int:
        try:
            return parse_amount(tokens[0].value, zero=zero)
        except UsageError as error:
            raise UsageError(f"{tokens[0].keyword}: {error}") from None

    return Parameter(metavar="DOLLARS", converter=convert, show_default=False)


def megabytes_option(name: str) -> Parameter:
    """Return the converter of an option in megabytes for a field in bytes."""
    return Parameter(
        name=name,
        metavar="MEGABYTES",
        converter=_bytes_of_megabytes,
        show_default=lambda number: f"{number / 1_000_000:g}",
    )


def _bytes_of_megabytes(_: type, tokens: Sequence[Token]) -> int:
    try:
        return int(float(tokens[0].value) * 1_000_000)
    except (ValueError, OverflowError):
        raise UsageError(f"{tokens[0].keyword} {tokens[0].value[:40]!r}: give a number of megabytes") from None


def parse_amount(text: str, *, zero: bool = False) -> int:
    """Convert a typed amount of dollars to nano-dollars.

    Args:
        zero: accept 0.

    Raises:
        UsageError: the text is no amount of dollars, or it is 0 and `zero` is false.
    """
    from unmask.accounts.money import parse_dollars

    try:
        amount = parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if amount == 0 and not zero:
        raise UsageError(f"{text} dollars: it must be more than 0")
    return amount


def duration_ms(count: float, option: str, *, hours: float, least: float) -> int:
    """Convert a typed number of days or hours to milliseconds.

    Args:
        option: names it in the message.
        hours: of one unit.
        least: the smallest number that makes sense.

    Raises:
        UsageError: the number is smaller, or longer than a century.
    """
    if not least <= count <= 100 * 366 * 24 / hours:  # also refuses NaN
        raise UsageError(f"{option} {count:g}: give {least:g} or more, and a century at most")
    return int(count * hours * 3_600_000)
