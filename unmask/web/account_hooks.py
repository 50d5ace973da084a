"""Where accounts join the pages. Without accounts there is nothing to show, and nothing is shown."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request

from unmask.catalogue import Record


@dataclass(frozen=True)
class WantIt:
    """The button on the page of a model that is not live.

    Attributes:
        votes: accounts that want the model.
        action: where the form goes.
        voted: whether this visitor has asked for it.
        note: what for, as this visitor has said.
        token: proves that the form is from this page; empty for a visitor who is not signed in.
        sign_in: where such a visitor goes first.
    """

    votes: int
    action: str
    voted: bool = False
    note: str = ""
    token: str = ""
    sign_in: str = ""


@dataclass(frozen=True)
class Seams:
    """What the pages ask of the accounts.

    Attributes:
        links: for a visitor, what stands at the right of every page's head: (title, address).
        want: the button for a model, or None.
        ask: the form for a model that is not in the catalogue.
        votes: how many want each model, for the order "most wanted"; None for no such order.
    """

    links: Callable[[Request], list[tuple[str, str]]] = lambda request: []
    want: Callable[[Request, Record], Awaitable[WantIt | None]] | None = None
    ask: Callable[[Request], Awaitable[WantIt]] | None = None
    votes: Callable[[], Awaitable[Mapping[str, int]]] | None = None
