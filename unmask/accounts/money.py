"""Money as integers of nano-dollars, 1e-9 USD. Floats never touch it."""

import re

NANO = 1_000_000_000  # nano-dollars in a dollar
MAX_AMOUNT = 10**17  # a hundred million dollars: far above any booking, far below what 64 bits hold

_DOLLARS = re.compile(r"\$?([0-9]{1,9})(?:\.([0-9]{1,9}))?", re.ASCII)


def parse_dollars(text: str) -> int:
    """Return the nano-dollars of a decimal number of dollars, such as "12.50" or "0.000000008".

    Raises:
        ValueError: not such a number, or finer than a nano-dollar.
    """
    match = _DOLLARS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is no amount of dollars: write it like 12.50, with at most nine decimals")
    return int(match[1]) * NANO + int((match[2] or "").ljust(9, "0"))


def format_dollars(nano: int) -> str:
    """Return the exact dollars of an amount, with at least two decimals: 8 is "0.000000008"."""
    whole, rest = divmod(abs(nano), NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{decimals}"


def cost(tokens: int, nano_per_million: int) -> int:
    """Return the nano-dollars for `tokens`, a part of a nano-dollar counting as a whole one.

    Args:
        tokens: how many.
        nano_per_million: price of a million of them, in nano-dollars.
    """
    return -(-tokens * nano_per_million // 1_000_000)
