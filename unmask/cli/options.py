"""Options that several commands share, and the amounts of money in them."""

from typing import Annotated, Literal

from cyclopts import Parameter

# Actor of the command line in the audit log and in the history of a model.
ACTOR = "command line"

DeviceOption = Annotated[
    str,
    Parameter(
        name="--device",
        help="Torch device: cpu, or cuda with --dtype bfloat16. The CUDA code has not been run on a GPU yet.",
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"],
    Parameter(
        name="--dtype",
        help="Precision of the weights. int8 is almost twice as fast on a CPU; its vectors have a cosine of about "
        "0.9994 to those of float32.",
    ),
]
AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON, for scripts.")]


def parse_amount(text: str, *, zero: bool = False) -> int:
    """Convert a typed amount of dollars to nano-dollars.

    Args:
        zero: accept 0.

    Raises:
        UsageError: the text is no amount of dollars, or it is 0 and `zero` is false.
    """
    from unmask.accounts.money import parse_dollars
    from unmask.errors import UsageError

    try:
        amount = parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if amount == 0 and not zero:
        raise UsageError(f"{text} dollars: it must be more than 0")
    return amount
