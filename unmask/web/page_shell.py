"""The shell of pages for one person: no caching, a form token, the result or the error of the last form."""

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from unmask.api.errors import api_error
from unmask.errors import RateLimited, UnmaskError, UsageError
from unmask.web.forms import sentence
from unmask.web.sessions import form_token

# Messages after a form, by the parameter `done`. No text out of the address is ever shown.
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
    "quarantined": "The provider is out of traffic, within a second on every server.",
    "checked": "The provider is being checked, and answers again if its vectors are right.",
    "revoked": "The key is revoked: nobody can use it any more.",
}


class RenderPage(Protocol):
    """Signature of `Site.render`."""

    def __call__(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        **values: object,
    ) -> Response: ...


def render_private_page(
    render: RenderPage,
    request: Request,
    template: str,
    *,
    error: UnmaskError | None = None,
    **values: object,
) -> Response:
    """Render a page for one person.

    Args:
        render: `Site.render`.
        request: has the visitor's cookies, and in `done` the result of the last form.
        template: file name, `NAME.html.j2`.
        error: error of the form that was sent; decides the HTTP status.
        values: for the template.
    """
    status, headers = 200, {"cache-control": "private, no-store", "referrer-policy": "same-origin"}
    if error is not None:
        status = 400 if isinstance(error, UsageError) else api_error(error).status
        if isinstance(error, RateLimited) and error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
    return render(
        request,
        template,
        status=status,
        headers=headers,
        form_token=form_token(request),
        error=sentence(error) if error else "",
        notice=_NOTICES.get(request.query_params.get("done", ""), ""),
        **values,
    )
