"""`PageContext`: the data of one request that pages share. It lies beside the API's `RequestContext`."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from unmask.accounts import Accounts
from unmask.accounts.people import Person
from unmask.accounts.tariff import TariffPrice
from unmask.api.settings import ServeSettings

_KEY = "page"


@dataclass(eq=False)
class PageContext:
    """Data of one request for a page.

    Attributes:
        accounts: of this server; None on a server without them.
        settings: of this server; None on a server without accounts.
        is_resolved: `visitor` has been looked up.
        visitor: the person who is signed in.
        form_cookie: secret of the form tokens of a visitor without session and cookie; "" before the first form.
        prices: the operator's prices; None on a server without accounts.
    """

    accounts: Accounts | None = None
    settings: ServeSettings | None = None
    is_resolved: bool = False
    visitor: Person | None = None
    form_cookie: str = ""
    prices: Sequence[TariffPrice] | None = None


def page_context(request: Request) -> PageContext:
    """Return the context of a request, made at the first call."""
    return request.scope.setdefault("state", {}).setdefault(_KEY, PageContext())
