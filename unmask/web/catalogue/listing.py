"""Searching, filtering and sorting the catalogue by what stands in the address."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from unmask.api.errors import ApiError
from unmask.web.catalogue.model_view import ORDER, Shown

PER_PAGE = 50

SIZES: dict[str, tuple[str, float, float]] = {
    "small": ("up to 200 M", 0, 2e8),
    "medium": ("200 M to 2 B", 2e8, 2e9),
    "large": ("above 2 B", 2e9, math.inf),
}
DIMENSIONS: dict[str, tuple[str, float, float]] = {
    "512": ("up to 512", 0, 512),
    "1024": ("513 to 1,024", 512, 1024),
    "more": ("above 1,024", 1024, math.inf),
}
PRICES = {"set": "with a price", "unset": "no price yet"}
SORTS = {
    "availability": "Availability",
    "mteb": "Quality, MTEB",
    "local": "Quality, measured here",
    "speed": "Speed",
    "price": "Price",
    "newest": "Newest",
    "size": "Smallest",
    "name": "Name",
}
WANTED = {"wanted": "Most wanted"}


@dataclass(frozen=True)
class Query:
    """What a visitor asked for. Empty means everything."""

    q: str = ""
    task: str = ""
    licence: str = ""
    size: str = ""
    dimensions: str = ""
    status: str = ""
    price: str = ""
    sort: str = "availability"
    page: int = 1

    @property
    def filtered(self) -> bool:
        return any((self.q, self.task, self.licence, self.size, self.dimensions, self.status, self.price))

    def address(self, **changes: object) -> str:
        """Of the same list, but for some changes."""
        fields = {name: value for name, value in vars(replace(self, **changes)).items() if value}  # pyright: ignore[reportArgumentType]
        if fields.get("sort") == "availability":
            del fields["sort"]
        if fields.get("page") == 1:
            del fields["page"]
        return f"/models?{urlencode(fields)}" if fields else "/models"


@dataclass(frozen=True)
class Choices:
    """What each filter can be set to: value -> what it says."""

    task: Mapping[str, str]
    licence: Mapping[str, str]
    size: Mapping[str, str]
    dimensions: Mapping[str, str]
    status: Mapping[str, str]
    price: Mapping[str, str]
    sort: Mapping[str, str]


@dataclass(frozen=True)
class Listing:
    """The answer to a query: one page of what was found."""

    query: Query
    choices: Choices
    found: list[Shown]
    total: int

    @property
    def pages(self) -> int:
        return max(1, math.ceil(len(self.found) / PER_PAGE))

    @property
    def rows(self) -> list[Shown]:
        start = (self.query.page - 1) * PER_PAGE
        return self.found[start : start + PER_PAGE]


def choices_of(models: Sequence[Shown], *, wanted: bool = False) -> Choices:
    """What these models can be filtered by."""
    standings = {shown.standing for shown in models}
    return Choices(
        task=_same(sorted({shown.record.task for shown in models})),
        licence=_same(sorted({shown.record.licence for shown in models if shown.record.licence})),
        size={key: label for key, (label, _, _) in SIZES.items()},
        dimensions={key: label for key, (label, _, _) in DIMENSIONS.items()},
        status=_same([standing for standing in ORDER if standing in standings]),
        price=PRICES,
        sort=SORTS | (WANTED if wanted else {}),
    )


def read_query(params: QueryParams, choices: Choices) -> Query:
    """The query of an address.

    Raises:
        ApiError: 400, a filter is set to what there is not.
    """
    given = {name: params.get(name, "").strip() for name in Choices.__dataclass_fields__}
    for name, value in given.items():
        options: Mapping[str, str] = getattr(choices, name)
        if value and value not in options:
            raise ApiError(
                400,
                f"{name}={value[:80]!r} is none of the choices: {', '.join(options)}.",
                param=name,
                code="no_such_choice",
            )
    page = params.get("page", "") or "1"
    if not (page.isascii() and page.isdigit() and 1 <= int(page[:6]) <= 99_999):
        raise ApiError(400, f"page={page[:80]!r} is no page: count from 1.", param="page", code="no_such_choice")
    given["sort"] = given["sort"] or "availability"
    return Query(q=params.get("q", "").strip()[:200], page=int(page), **given)


def browse(models: Sequence[Shown], query: Query, choices: Choices, votes: Mapping[str, int]) -> Listing:
    """Those models that a query asks for, in its order."""
    words = query.q.lower().split()
    found = [shown for shown in models if _fits(shown, query, words)]
    # Every order falls back on availability, then on quality, so that equals stand where a visitor expects them.
    found.sort(key=lambda shown: shown.record.id.lower())
    found.sort(key=_descending(lambda shown: shown.figures.mteb))
    found.sort(key=lambda shown: ORDER.index(shown.standing))
    order = _orders(votes).get(query.sort)
    if order is not None:
        found.sort(key=order)
    listing = Listing(query, choices, found, len(models))
    return replace(listing, query=replace(query, page=min(query.page, listing.pages)))


def _orders(votes: Mapping[str, int]) -> dict[str, Callable[[Shown], tuple[bool, float | str]]]:
    return {
        "mteb": _descending(lambda shown: shown.figures.mteb),
        "local": _descending(lambda shown: shown.figures.local),
        "speed": _descending(lambda shown: m.value if (m := shown.figures.texts_per_second) else None),
        "price": lambda shown: _last_if_none(_price(shown)),
        "newest": _descending(lambda shown: d.toordinal() if (d := shown.record.published) else None),
        "size": lambda shown: _last_if_none(shown.record.parameters),
        "name": lambda shown: (False, (shown.record.name or shown.record.id).lower()),
        "wanted": _descending(lambda shown: votes.get(shown.record.id)),
    }


def _fits(shown: Shown, query: Query, words: Sequence[str]) -> bool:
    record = shown.record
    if query.status and shown.standing != query.status:
        return False
    if query.task and record.task != query.task:
        return False
    if query.licence and record.licence != query.licence:
        return False
    if query.price and (query.price == "set") != bool(record.prices):
        return False
    if query.size and not _within(record.parameters, SIZES[query.size]):
        return False
    if query.dimensions and not _within(record.dimensions, DIMENSIONS[query.dimensions]):
        return False
    if not words:
        return True
    parts = (record.id, record.name, record.summary, record.base or "", record.architecture or "", *record.aliases)
    text = "\n".join((*parts, *record.best_for, *record.languages)).lower()
    return all(word in text for word in words)


def _within(value: int | None, bounds: tuple[str, float, float]) -> bool:
    return value is not None and bounds[1] < value <= bounds[2]


def _descending(value: Callable[[Shown], float | None]) -> Callable[[Shown], tuple[bool, float | str]]:
    """Highest first; what is not known comes last."""

    def key(shown: Shown) -> tuple[bool, float | str]:
        found = value(shown)
        return found is None, -(found or 0)

    return key


def _last_if_none(value: float | None) -> tuple[bool, float | str]:
    return value is None, value or 0


def _price(shown: Shown) -> int | None:
    return min((price.nanodollars_per_million_tokens for price in shown.record.prices), default=None)


def _same(values: Sequence[str]) -> dict[str, str]:
    return {value: value for value in values}
