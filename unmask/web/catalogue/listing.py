"""The list of models: filters, order and pages."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from unmask.web.catalogue.model_view import STATUS_ORDER, ModelView

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
VOTE_SORTS = {"votes": "Most votes"}

SortKey = tuple[bool, float | str]


@dataclass(frozen=True)
class ListingQuery:
    """Filters, order and page of the list. An empty filter lets every model through."""

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
        """Return the address of the same list with some fields changed."""
        fields = {name: value for name, value in vars(replace(self, **changes)).items() if value}  # pyright: ignore[reportArgumentType]
        if fields.get("sort") == "availability":
            del fields["sort"]
        if fields.get("page") == 1:
            del fields["page"]
        return f"/models?{urlencode(fields)}" if fields else "/models"


@dataclass(frozen=True)
class FilterChoices:
    """Choices of each filter: value -> label."""

    task: Mapping[str, str]
    licence: Mapping[str, str]
    size: Mapping[str, str]
    dimensions: Mapping[str, str]
    status: Mapping[str, str]
    price: Mapping[str, str]
    sort: Mapping[str, str]


@dataclass(frozen=True)
class Listing:
    """One page of the models that match a query. `total` counts all models of the catalogue."""

    query: ListingQuery
    choices: FilterChoices
    matches: list[ModelView]
    total: int

    @property
    def pages(self) -> int:
        return max(1, math.ceil(len(self.matches) / PER_PAGE))

    @property
    def rows(self) -> list[ModelView]:
        start = (self.query.page - 1) * PER_PAGE
        return self.matches[start : start + PER_PAGE]


def filter_choices(models: Sequence[ModelView], *, by_votes: bool = False) -> FilterChoices:
    """List the choices that fit these models; `by_votes` adds the order by number of votes."""
    statuses = {view.display_status for view in models}
    return FilterChoices(
        task=_unlabelled(sorted({view.record.task for view in models})),
        licence=_unlabelled(sorted({view.record.licence for view in models if view.record.licence})),
        size={key: label for key, (label, _, _) in SIZES.items()},
        dimensions={key: label for key, (label, _, _) in DIMENSIONS.items()},
        status=_unlabelled([status for status in STATUS_ORDER if status in statuses]),
        price=PRICES,
        sort=SORTS | (VOTE_SORTS if by_votes else {}),
    )


def list_models(
    models: Sequence[ModelView], query: ListingQuery, choices: FilterChoices, votes: Mapping[str, int]
) -> Listing:
    """Filter and sort the models; a page after the last one becomes the last one."""
    words = query.q.lower().split()
    matches = [view for view in models if _matches(view, query, words)]
    # Ties are broken by status, then by MTEB, then by id: sorts are stable, so the last key is sorted first.
    matches.sort(key=lambda view: view.record.id.lower())
    matches.sort(key=_descending(lambda view: view.figures.mteb))
    matches.sort(key=lambda view: STATUS_ORDER.index(view.display_status))
    sort_key = _sort_keys(votes).get(query.sort)
    if sort_key is not None:
        matches.sort(key=sort_key)
    listing = Listing(query, choices, matches, len(models))
    return replace(listing, query=replace(query, page=min(query.page, listing.pages)))


def _sort_keys(votes: Mapping[str, int]) -> dict[str, Callable[[ModelView], SortKey]]:
    return {
        "mteb": _descending(lambda view: view.figures.mteb),
        "local": _descending(lambda view: view.figures.local),
        "speed": _descending(lambda view: m.value if (m := view.figures.texts_per_second) else None),
        "price": lambda view: _ascending(_lowest_price(view)),
        "newest": _descending(lambda view: day.toordinal() if (day := view.record.published) else None),
        "size": lambda view: _ascending(view.record.parameters),
        "name": lambda view: (False, (view.record.name or view.record.id).lower()),
        "votes": _descending(lambda view: votes.get(view.record.id)),
    }


def _matches(view: ModelView, query: ListingQuery, words: Sequence[str]) -> bool:
    record = view.record
    if query.status and view.display_status != query.status:
        return False
    if query.task and record.task != query.task:
        return False
    if query.licence and record.licence != query.licence:
        return False
    if query.price and (query.price == "set") != bool(record.prices):
        return False
    if query.size and not _in_range(record.parameters, SIZES[query.size]):
        return False
    if query.dimensions and not _in_range(record.dimensions, DIMENSIONS[query.dimensions]):
        return False
    if not words:
        return True
    parts = (record.id, record.name, record.summary, record.base or "", record.architecture or "", *record.aliases)
    text = "\n".join((*parts, *record.best_for, *record.languages)).lower()
    return all(word in text for word in words)


def _in_range(value: int | None, choice: tuple[str, float, float]) -> bool:
    return value is not None and choice[1] < value <= choice[2]


def _descending(value_of: Callable[[ModelView], float | None]) -> Callable[[ModelView], SortKey]:
    """Return a sort key: highest value first, unknown values last."""

    def key(view: ModelView) -> SortKey:
        value = value_of(view)
        return value is None, -(value or 0)

    return key


def _ascending(value: float | None) -> SortKey:
    return value is None, value or 0


def _lowest_price(view: ModelView) -> int | None:
    return min((price.nanodollars_per_million_tokens for price in view.record.prices), default=None)


def _unlabelled(values: Sequence[str]) -> dict[str, str]:
    return {value: value for value in values}
