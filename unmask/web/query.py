"""What a visitor's address asks for: parameters of the query string, or an error that names the one at fault."""

from collections.abc import Sequence

from starlette.requests import Request

from unmask.api.errors import ApiError


def asked_choice(request: Request, name: str, choices: Sequence[str]) -> str:
    """A parameter out of `choices`, the first one if it is left out.

    Raises:
        ApiError: 400, it is none of them.
    """
    given = request.query_params.get(name) or choices[0]
    if given not in choices:
        raise ApiError(400, f"The parameter '{name}' must be one of {', '.join(choices)}.", param=name)
    return given


def asked_number(request: Request, name: str) -> int | None:
    """A whole number in the query string.

    Raises:
        ApiError: 400, it is none.
    """
    given = request.query_params.get(name)
    if not given:
        return None
    if not (given.isascii() and given.isdecimal()) or len(given) > 18:
        raise ApiError(400, f"The parameter '{name}' must be a whole number.", param=name)
    return int(given)


def asked_place(request: Request) -> tuple[int, str] | None:
    """Where a page of a long list begins: the time and the id of the last row on the page before.

    Raises:
        ApiError: 400, it is not what that page gave.
    """
    given = request.query_params.get("before")
    if not given:
        return None
    at, _, id = given.partition(".")
    if not (at.isascii() and at.isdecimal()) or len(at) > 18 or not id:
        raise ApiError(400, "The parameter 'before' must be what the page before gave.", param="before")
    return int(at), id
