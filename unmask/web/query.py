"""Query parameters: the one place where pages read the query string. A wrong value is an error that names it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from starlette.datastructures import QueryParams

from unmask.api.errors import ApiError
from unmask.web.catalogue.comparison import MAX_MODELS
from unmask.web.catalogue.listing import FilterChoices, ListingQuery


@dataclass(frozen=True)
class ComparisonQuery:
    """Models to compare.

    Attributes:
        ids: model ids, each once.
        only_differences: show only the rows whose values differ.
        repeats_parameter: the form sent one `models` parameter per model; the canonical address has all in one.
    """

    ids: list[str]
    only_differences: bool
    repeats_parameter: bool


def parse_choice(params: QueryParams, name: str, choices: Sequence[str]) -> str:
    """Read a parameter that is one of `choices`; the first one if it is left out.

    Raises:
        ApiError: 400, it is none of them.
    """
    value = params.get(name) or choices[0]
    if value not in choices:
        raise ApiError(400, f"The parameter '{name}' must be one of {', '.join(choices)}.", param=name)
    return value


def parse_number(params: QueryParams, name: str) -> int | None:
    """Read a whole number; None if it is left out.

    Raises:
        ApiError: 400, it is not a whole number of at most 18 digits.
    """
    text = params.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise ApiError(400, f"The parameter '{name}' must be a whole number.", param=name)
    return int(text)


def parse_cursor(params: QueryParams) -> tuple[int, str] | None:
    """Read `before`, the cursor of a long list: time and id of the last row on the previous page.

    Raises:
        ApiError: 400, it is not a cursor that `format_cursor` made.
    """
    text = params.get("before")
    if not text:
        return None
    at, _, id = text.partition(".")
    if not (at.isascii() and at.isdecimal()) or len(at) > 18 or not id:
        raise ApiError(
            400, "The parameter 'before' must be the value in the link on the previous page.", param="before"
        )
    return int(at), id


def format_cursor(at: int, id: str) -> str:
    """Write the cursor of the page after the row with this time and id."""
    return f"{at}.{id}"


def parse_listing_query(params: QueryParams, choices: FilterChoices) -> ListingQuery:
    """Read the filters, order and page of the list of models.

    Raises:
        ApiError: 400, a filter has a value that is not among its choices, or `page` is not a page number.
    """
    filters = {field.name: params.get(field.name, "").strip() for field in fields(FilterChoices)}
    for name, value in filters.items():
        options: Mapping[str, str] = getattr(choices, name)
        if value and value not in options:
            raise ApiError(
                400,
                f"{name}={value[:80]!r} is none of the choices: {', '.join(options)}.",
                param=name,
                code="no_such_choice",
            )
    page = params.get("page", "") or "1"
    if not (page.isascii() and page.isdigit() and len(page) <= 6 and 1 <= int(page) <= 99_999):
        raise ApiError(400, f"page={page[:80]!r} is no page: count from 1.", param="page", code="no_such_choice")
    filters["sort"] = filters["sort"] or "availability"
    return ListingQuery(q=params.get("q", "").strip()[:200], page=int(page), **filters)


def parse_comparison_query(params: QueryParams) -> ComparisonQuery:
    """Read model ids from `models=a,b` and from `models=a&models=b`.

    Raises:
        ApiError: 400, there are more models than fit on a page.
    """
    values = params.getlist("models")
    ids = list(dict.fromkeys(id.strip() for value in values for id in value.split(",") if id.strip()))
    if len(ids) > MAX_MODELS:
        message = f"models names {len(ids)} models: compare at most {MAX_MODELS}."
        raise ApiError(400, message, param="models", code="too_many")
    return ComparisonQuery(ids, params.get("only", "") == "differences", len(values) > 1)
