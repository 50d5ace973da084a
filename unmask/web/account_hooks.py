"""`AccountHooks`: the functions by which the catalogue's pages read accounts. Without accounts all are absent."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request

from unmask.catalogue import Record


@dataclass(frozen=True)
class VoteButton:
    """The form with which a visitor votes for a model that is not live.

    Attributes:
        votes: number of accounts that want the model.
        action: address to which the form is sent.
        voted: this visitor has voted for the model.
        note: the visitor's own note on the purpose.
        token: form token; empty for a visitor who is not signed in.
        sign_in: address of the sign-in page, for a visitor who is not signed in.
    """

    votes: int
    action: str
    voted: bool = False
    note: str = ""
    token: str = ""
    sign_in: str = ""


@dataclass(frozen=True)
class AccountHooks:
    """Functions that read accounts for a page.

    Attributes:
        visitor_links: links at the right of every page's head, as (title, address).
        vote_button: the form for a model; None for a model that cannot be voted for.
        request_form: the form that asks for a model that is not in the catalogue.
        vote_counts: votes by model id, for the order "most votes".
    """

    visitor_links: Callable[[Request], list[tuple[str, str]]] = lambda request: []
    vote_button: Callable[[Request, Record], Awaitable[VoteButton | None]] | None = None
    request_form: Callable[[Request], Awaitable[VoteButton]] | None = None
    vote_counts: Callable[[], Awaitable[Mapping[str, int]]] | None = None
