"""The page of the playground: its form and the result of a trial."""

from starlette.requests import Request
from starlette.responses import Response

from unmask.api.body import read_body
from unmask.api.context import context_of
from unmask.api.errors import ApiError, api_error
from unmask.errors import UnmaskError
from unmask.web.catalogue.model_view import ModelView
from unmask.web.catalogue.playground import (
    BODY_LIMIT_BYTES,
    EXAMPLE,
    MAX_CHARACTERS,
    MAX_TEXTS,
    Trial,
    TrialResult,
    parse_trial,
    run_trial,
    trial_error,
)
from unmask.web.site import Site


async def playground_page(site: Site, request: Request) -> Response:
    """Show the form; on POST run the trial and show its result as well.

    Raises:
        ApiError: 400, 408, 413 for a form that cannot be read; 403 for one from another site; 404 for a model that is
            not live; 429 for too many trials.
    """
    if request.method == "POST":
        return await _run(site, request)
    view = _live_model(site, request, request.query_params.get("model", ""))
    return _render(site, request, view, Trial(list(EXAMPLE), "I cannot get into my account"))


async def _run(site: Site, request: Request) -> Response:
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "This form was sent from another site: use the page itself.", code="cross_site")
    body = await read_body(request, BODY_LIMIT_BYTES, site.settings.receive_timeout_s)
    id, trial = parse_trial(body)
    view = _live_model(site, request, id)
    served, context = view.served, context_of(request)
    assert served
    if error := trial_error(trial):
        return _render(site, request, view, trial, error=error, status=400)
    caller = f"playground {context.share}"
    site.trial_limit.take(caller)
    try:
        result = await run_trial(site.models, served, trial, caller)
    except ApiError:
        raise
    except UnmaskError as failure:
        answer = api_error(failure)
        return _render(site, request, view, trial, error=str(answer), status=answer.status)
    site.metrics.count_tokens(view.record.id, result.tokens)
    context.tokens = result.tokens
    return _render(site, request, view, trial, result=result)


def _live_model(site: Site, request: Request, id: str) -> ModelView:
    """Return the served model with this id; the first served model if the id is empty.

    Raises:
        ApiError: 404, this server does not serve it.
    """
    if not id:
        first = next((view for view in site.model_views(request) if view.is_served), None)
        if first is None:
            raise ApiError(404, "This server answers for no model: there is none to try.", code="model_not_found")
        return first
    view = site.find_model_view(request, id)
    if view is None or not view.is_served:
        raise ApiError(404, f"{id[:120]!r} does not answer here: choose a live model.", code="model_not_found")
    return view


def _render(
    site: Site,
    request: Request,
    view: ModelView,
    trial: Trial,
    *,
    result: TrialResult | None = None,
    error: str = "",
    status: int = 200,
) -> Response:
    return site.render(
        request,
        "playground.html.j2",
        status=status,
        record=view.record,
        live=[other for other in site.model_views(request) if other.is_served],
        trial=trial,
        result=result,
        error=error,
        max_texts=MAX_TEXTS,
        max_characters=MAX_CHARACTERS,
    )
