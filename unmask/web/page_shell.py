"""How every page looks that is for one person: kept by no cache, with a token for its forms, saying what went wrong."""

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from unmask.api.errors import api_error
from unmask.errors import RateLimited, UnmaskError, UsageError
from unmask.web.forms import sentence
from unmask.web.sessions import form_token

# What a page says after a form has done its work; only these words, never any out of the address.
_NOTICES = {
    "signed-up": "If nobody had this address yet, its account is there now. Sign in with the password you chose.",
    "signed-out": "You are signed out.",
    "unlinked": "You can sign in that way no longer, and every browser is signed out. Sign in with your password.",
    "password": "The password is changed, and every browser is signed out. Sign in with the new one.",
    "linked": "From now on you can sign in that way as well.",
    "deleted": "The account is deleted.",
    "changed": "The key is changed.",
    "frozen": "The account is frozen: it can call nothing until it is thawed.",
    "thawed": "The account is thawed.",
    "topped-up": "The credit is added.",
    "refunded": "The charge is given back.",
    "plan": "The account is on its new plan.",
    "plans": "The plan is set. It holds from the next request on.",
    "price": "The prices are changed, within five seconds on every server.",
    "revoked": "The key is revoked: nobody can use it any more.",
}


class Render(Protocol):
    """`Website.render`."""

    def __call__(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        **values: object,
    ) -> Response: ...


def show(
    render: Render,
    request: Request,
    template: str,
    *,
    wrong: UnmaskError | None = None,
    **values: object,
) -> Response:
    """A page that no cache keeps, with a token for its forms and what went wrong with the last one."""
    status, headers = 200, {"cache-control": "private, no-store", "referrer-policy": "same-origin"}
    if wrong is not None:
        status = 400 if isinstance(wrong, UsageError) else api_error(wrong).status
        if isinstance(wrong, RateLimited) and wrong.retry_after is not None:
            headers["retry-after"] = str(max(1, round(wrong.retry_after)))
    return render(
        request,
        template,
        status=status,
        headers=headers,
        form_token=form_token(request),
        wrong=sentence(wrong) if wrong else "",
        notice=_NOTICES.get(request.query_params.get("done", ""), ""),
        **values,
    )
