"""Parsing of large bodies beside the event loop.

A JSON decoder holds the interpreter until it returns, in whatever thread it runs. So a thread alone does not help: a
body of 30 MB with 2.5 million fields stopped the server for three seconds. A large body is first scanned in short
steps, and refused if it has more names and values than any request needs. What is left takes at most about a tenth of a
second a call, for one string of 30 MB, and some milliseconds for most bodies.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from unmask.api.errors import ApiError

# A smaller body is parsed in 10 ms whatever is in it, and nearly always in less than a thread costs.
LARGE_BYTES = 65_536
# Names of all objects: 2048 inputs of one field each, and far more fields than any client sends.
MAX_NAMES = 10_000
# Values of all arrays, whatever the server's limit of tokens: token ids have one each.
MIN_VALUES = 600_000
# A step keeps the interpreter for less than a millisecond.
_STEP_BYTES = 131_072

_QUOTE, _COMMA, _COLON, _BACKSLASH = b'",:\\'

Result = TypeVar("Result")

# Two, so that large bodies take neither all processors nor memory without a limit.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="large-body")


async def parse_body(body: bytes, max_tokens: int, parse: Callable[[], Result]) -> Result:
    """Parse a body: a small one at once, a large one in a thread.

    Args:
        body: the body.
        max_tokens: most tokens of a request. A large body may have twice as many values, so that a request with a few
            tokens too many is refused for its tokens.
        parse: parses it.

    Raises:
        ApiError: 400, a large body has too many names or values; whatever `parse` raises.
    """
    if len(body) <= LARGE_BYTES:
        return parse()

    def check_and_parse() -> Result:
        check_counts(body, max(MIN_VALUES, 2 * max_tokens))
        return parse()

    return await asyncio.get_running_loop().run_in_executor(_THREADS, check_and_parse)


def check_counts(body: bytes, max_values: int) -> None:
    """Refuse a body with too many names or values. Colons and commas inside of strings do not count.

    Raises:
        ApiError: 400.
    """
    content = np.frombuffer(body, np.uint8)
    steps = [content[start : start + _STEP_BYTES] for start in range(0, len(content), _STEP_BYTES)]
    names, values = 0, 0
    for step in steps:
        names += int(np.count_nonzero(step == _COLON))
        values += int(np.count_nonzero(step == _COMMA))
    if names <= MAX_NAMES and values < max_values:
        return
    names, values, in_string, is_escaped = 0, 0, False, False
    for step in steps:
        quotes, is_escaped = _find_quotes(step, is_escaped)
        inside = np.logical_xor.accumulate(quotes) ^ in_string
        in_string = bool(inside[-1])
        names += int(np.count_nonzero((step == _COLON) & ~inside))
        values += int(np.count_nonzero((step == _COMMA) & ~inside))
        if names > MAX_NAMES:
            raise ApiError(400, f"The body has more than {MAX_NAMES} names of fields, which is the most.")
        if values >= max_values:
            raise ApiError(400, f"The body has more than {max_values} values, which is the most.")


def _find_quotes(step: np.ndarray, is_escaped: bool) -> tuple[np.ndarray, bool]:
    """Return a mask of the quotes that begin or end a string, and whether the next byte of the body is escaped.

    A byte is escaped behind an odd number of backslashes.

    Args:
        step: uint8 [n], part of the body.
        is_escaped: True if its first byte is escaped.
    """
    quotes = step == _QUOTE
    backslashes = step == _BACKSLASH
    if not is_escaped and not backslashes.any():
        return quotes, False
    positions = np.arange(len(step), dtype=np.int32)
    # Position of the last byte up to each one that is no backslash; a backslash before the step counts as one.
    others = np.maximum.accumulate(np.where(backslashes, np.int32(-1 - is_escaped), positions))
    runs = positions - others  # backslashes that end at each byte
    before = np.empty_like(runs)
    before[0], before[1:] = is_escaped, runs[:-1]
    return quotes & (before % 2 == 0), bool(runs[-1] % 2)
