"""The pages by address. Each reads the catalogue and the engines' states and hands both to a template."""

import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from unmask.accounts import Accounts
from unmask.accounts.tariff import Price
from unmask.api.body import read_body
from unmask.api.context import context_of
from unmask.api.errors import ApiError, api_error
from unmask.api.metrics import Metrics
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import WebPages, accepts_html
from unmask.catalogue import Catalogue, Measurement, Record
from unmask.catalogue.figures import SUITES, CategoryScores, SuiteScores
from unmask.catalogue.measurement import LOCAL, MTEB
from unmask.catalogue.speed import points_of
from unmask.errors import StorageError, UnmaskError
from unmask.router import ModelRegistry
from unmask.web.account.pages import AccountPages
from unmask.web.account.sign_in import Entrance
from unmask.web.account.votes import Wanting, account_seams
from unmask.web.account_hooks import Seams
from unmask.web.admin.models import Operating
from unmask.web.admin.pages import AdminPages
from unmask.web.catalogue import alternates, documentation, quality_charts, speed_charts
from unmask.web.catalogue.comparison import MOST, chosen_ids, compare
from unmask.web.catalogue.listing import Listing, browse, choices_of, read_query
from unmask.web.catalogue.model_view import MEANINGS, Shown, all_shown, one_shown, pipeline, source_key, sources
from unmask.web.catalogue.playground import (
    BODY_LIMIT,
    EXAMPLE,
    MOST_CHARACTERS,
    MOST_TEXTS,
    Allowance,
    Trial,
    check_trial,
    read_trial,
    run_trial,
)
from unmask.web.catalogue.snippets import Snippet, snippets
from unmask.web.rendering import HEADERS, answer, assets, base_url, environment, page
from unmask.web.sessions import Handler, Reception

log = logging.getLogger("unmask")

_EMBEDDINGS = "/v1/embeddings"
_REFUSED, _FAILED = (400, 401, 404, 405, 408, 413, 415, 429), 500


@dataclass(eq=False)
class Website:
    """All pages of one server."""

    catalogue: Catalogue
    models: ModelRegistry
    settings: ServeSettings
    metrics: Metrics
    seams: Seams = field(default_factory=Seams)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    accounts: Accounts | None = None

    def __post_init__(self) -> None:
        self._clock = time.monotonic()
        self._charged: Sequence[Price] | None = None if self.accounts is None else ()
        self._allowance = Allowance()
        self.secured = bool(self.settings.api_keys) or self.accounts is not None
        self.playground_open = self.settings.playground
        if self.playground_open is None:
            self.playground_open = not self.secured
        for served in self.models.list():
            if self.catalogue.get(served.record.id) is None:
                self.catalogue.put(served.record)

    def site(self) -> WebPages:
        """The pages as the API takes them in."""
        pages: list[tuple[str, Handler]] = [
            ("/models", self.list_models),
            ("/models/{id:path}", self.model),
            ("/compare", self.comparison),
            ("/docs", self.docs),
            ("/status", self.status),
            ("/llms.txt", self.llms),
            ("/sitemap.xml", self.sitemap),
            ("/feed.xml", self.feed),
            ("/robots.txt", self.robots),
        ]
        routes = [Route(path, self._known(handler)) for path, handler in pages]
        routes.append(Route("/static/{name}", self.static))
        if self.playground_open:
            routes.append(Route("/playground", self._known(self.playground), methods=["GET", "POST"]))
        if self.accounts is not None:
            for room in (
                Entrance(self.accounts, self.render, self.base),
                AccountPages(self.accounts, self.models, self.render),
                AdminPages(self.accounts, self.models, self.render),
                Wanting(self.accounts, self.catalogue, self.render),
                Operating(self.accounts, self.render, mails=self.settings.mail is not None),
            ):
                own = room.routes()
                routes += [Route(r.path, self._known(r.endpoint), methods=list(r.methods or ())) for r in own]
        return WebPages(routes, self._known(self.home), self.error)

    async def home(self, request: Request) -> Response:
        models = self._all()
        live = [shown for shown in models if shown.answers]
        first = live[0] if live else None
        return self.render(
            request,
            "home.html.j2",
            live=live,
            soon=sorted(
                (shown for shown in models if shown.standing == "coming soon"),
                key=lambda shown: -(shown.figures.mteb or 0),
            ),
            counted=len(models),
            measured=sum(len(shown.entry.measurements) for shown in models),
            first=first,
            snippets=self._snippets(request, first.record) if first else [],
        )

    async def list_models(self, request: Request) -> Response:
        models = self._all()
        choices = choices_of(models, wanted=self.seams.votes is not None)
        query = read_query(request.query_params, choices)
        votes = await self.seams.votes() if self.seams.votes and query.sort == "wanted" else {}
        listing: Listing = browse(models, query, choices, votes)
        return self.render(
            request,
            "models.html.j2",
            listing=listing,
            query=listing.query,
            priced=any(shown.record.prices for shown in listing.rows),
            speed=quality_charts.quality_and_speed(listing.found),
            size=quality_charts.quality_and_size(listing.found),
            most=MOST,
            ask=await self.seams.ask(request) if self.seams.ask else None,
            votes=votes,
        )

    async def model(self, request: Request) -> Response:
        asked: str = request.path_params["id"]
        shown = self._one(asked)
        if shown is not None:
            if shown.record.id != asked:  # an alias: one page has one address
                return RedirectResponse(f"/models/{quote(shown.record.id)}", 301, HEADERS)
            return await self._model_page(request, shown)
        for ending, twin in ((".json", self._model_json), (".md", self._model_markdown)):
            if asked.endswith(ending):
                shown = self._one(asked.removesuffix(ending))
                if shown is not None:
                    return twin(request, shown)
        raise ApiError(
            404,
            f"No model here is called {asked[:120]!r}: see the list of models, or ask for it to be added.",
            code="model_not_found",
        )

    async def comparison(self, request: Request) -> Response:
        ids = chosen_ids(request.query_params)
        canonical = f"/compare?models={','.join(ids)}" if ids else "/compare"
        only = request.query_params.get("only", "") == "differences"
        found = [self._one(id) for id in ids]
        missing = [id for id, shown in zip(ids, found, strict=True) if shown is None]
        if missing:
            raise ApiError(
                404,
                f"No model here is called {missing[0][:120]!r}: see the list of models.",
                param="models",
                code="model_not_found",
            )
        models = [shown for shown in found if shown]
        if len(request.query_params.getlist("models")) > 1:
            # A form names each model by itself; the address to keep has them in one.
            return RedirectResponse(canonical + ("&only=differences" if only and ids else ""), 303, HEADERS)
        sections = compare(models) if len(models) > 1 else []
        names = [shown.record.id for shown in self._all() if shown.record.id not in ids]
        return self.render(
            request,
            "compare.html.j2",
            models=models,
            sections=sections,
            only=only,
            canonical=canonical,
            ids=ids,
            others=names,
            most=MOST,
        )

    async def docs(self, request: Request) -> Response:
        live = next((shown for shown in self._all() if shown.answers), None)
        return self.render(
            request,
            "docs.html.j2",
            errors=documentation.errors(self.settings),
            limits=documentation.limits(self.settings),
            snippets=self._snippets(request, live.record if live else Record(id="MODEL")),
        )

    async def status(self, request: Request) -> Response:
        answered = self.metrics.requests_by_status(_EMBEDDINGS)
        within = self.metrics.latency_buckets(_EMBEDDINGS)
        steps = [(0.0, 0), *within]
        spans = [(low, high, n - before) for (low, before), (high, n) in pairwise(steps)]
        tokens = self.metrics.tokens_by_model()
        return self.render(
            request,
            "status.html.j2",
            models=[
                (shown, shown.served, await self._waiting(shown), tokens.get(shown.record.id, 0))
                for shown in self._all()
                if shown.served
            ],
            started=self.started,
            up=time.monotonic() - self._clock,
            answered=answered.get(200, 0),
            refused=sum(answered.get(status, 0) for status in _REFUSED),
            failed=sum(n for status, n in answered.items() if status >= _FAILED),
            left=answered.get(499, 0),
            spans=[span for span in spans if span[2]],
            most=max((span[2] for span in spans), default=0),
            system=f"{platform.system()}, {platform.machine()}",
        )

    async def playground(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._try(request)
        shown = self._tried(request.query_params.get("model", ""))
        return self._playground_page(request, shown, Trial(list(EXAMPLE), "I cannot get into my account"))

    async def llms(self, request: Request) -> Response:
        text = environment().get_template("llms.txt.j2").render(base=self.base(request), models=self._all())
        return answer(request, text, "text/plain")

    async def sitemap(self, request: Request) -> Response:
        models = [(shown, alternates.changed_on(shown)) for shown in self._all()]
        text = environment().get_template("sitemap.xml.j2").render(base=self.base(request), models=models)
        return answer(request, text, "application/xml")

    async def feed(self, request: Request) -> Response:
        text = (
            environment().get_template("feed.xml.j2").render(base=self.base(request), news=alternates.news(self._all()))
        )
        return answer(request, text, "application/rss+xml")

    async def robots(self, request: Request) -> Response:
        closed = "".join(f"Disallow: {path}\n" for path in ("/v1/", "/playground", "/account", "/admin"))
        text = f"User-agent: *\n{closed}Sitemap: {self.base(request)}/sitemap.xml\n"
        return answer(request, text, "text/plain")

    async def static(self, request: Request) -> Response:
        found = assets().get(request.path_params["name"])
        if found is None:
            raise ApiError(404, f"There is no file {request.path_params['name'][:80]!r}.", code="not_found")
        content, media, digest = found
        fresh = request.query_params.get("v") == digest
        kept = "public, max-age=31536000, immutable" if fresh else "no-cache"
        return Response(content, headers=HEADERS | {"cache-control": kept, "etag": f'"{digest}"'}, media_type=media)

    def error(self, scope: Scope, error: ApiError) -> Response | None:
        """An error as a page, for a browser that was not talking to the API."""
        if scope["path"].startswith("/v1") or not accepts_html(scope):
            return None
        request = Request(scope)
        sent = dict(error.headers)
        if error.retry_after is not None:
            sent["retry-after"] = str(max(1, round(error.retry_after)))
        return self.render(request, "error.html.j2", status=error.status, headers=sent, message=str(error))

    def render(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **values: object,
    ) -> Response:
        """A page of this site, with what every page's head and foot need. Other rooms' pages come through here too."""
        return page(
            request,
            template,
            status=status,
            headers=self._kept_apart(headers),
            base=self.base(request),
            visitor_links=self.seams.links(request),
            secured=self.secured,
            signs_up=self.accounts is not None,
            playground_open=self.playground_open,
            http_status=status,
            **values,
        )

    def base(self, request: Request) -> str:
        """The address of this server, as its operator or else the visitor's browser says."""
        return base_url(request, self.settings.public_url)

    def _known(self, handler: Handler) -> Handler:
        """The page, told where there are accounts who looks at it, and what models cost."""
        accounts = self.accounts
        if accounts is None:
            return handler

        async def page(request: Request) -> Response:
            try:
                self._charged = await accounts.prices()
            except StorageError as error:
                # Most of the catalogue can be shown without, and what needs the database says so itself.
                log.warning("prices are shown as they were: %s", error)
            return await handler(request)

        return Reception(accounts, self.settings).receive(page)

    def _kept_apart(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        """With accounts, a page says who looks at it, and no cache may hand it to anybody else."""
        apart = {"cache-control": "private, no-cache", "vary": "accept, cookie, host"} if self.accounts else {}
        return apart | dict(headers or {})

    def _all(self) -> list[Shown]:
        return all_shown(self.catalogue, self.models, self._charged)

    def _one(self, id: str) -> Shown | None:
        return one_shown(self.catalogue, self.models, id, self._charged)

    def _snippets(self, request: Request, record: Record) -> list[Snippet]:
        return snippets(record, self.base(request), secured=self.secured)

    def _model_values(self, shown: Shown) -> dict[str, Any]:
        figures = shown.figures
        published, measured = (figures.suites.get((MTEB, origin)) for origin in ("published", "measured"))
        local = figures.suites.get((LOCAL, "measured"))
        theirs = {task.what: task for task in published.tasks} if published else {}
        return {
            "shown": shown,
            "record": shown.record,
            "standing": shown.standing,
            "meaning": MEANINGS[shown.standing],
            "figures": figures,
            "published": published,
            "measured": measured,
            "mteb_rows": _side_by_side(published, measured) if published or measured else [],
            "local": local,
            "theirs": theirs,
            "sources": sources(shown.entry.measurements),
            "source_key": source_key,
            "pipeline": pipeline(shown),
        }

    async def _model_page(self, request: Request, shown: Shown) -> Response:
        recent = self.metrics.recent_traffic(shown.record.id) if shown.answers else []
        points = points_of(shown.figures.sweep)
        return self.render(
            request,
            "model.html.j2",
            **self._model_values(shown),
            snippets=self._snippets(request, shown.record),
            related=_related(shown, self._all()),
            want=await self.seams.want(request, shown.record) if self.seams.want and not shown.answers else None,
            points=points,
            sweep=speed_charts.sweep_charts(points) if shown.answers else [],
            recent=speed_charts.traffic_charts(recent),
            answered=sum(stretch.requests for stretch in recent),
            linked_data=alternates.linked_data(shown, self.base(request)),
            tokens=self.metrics.tokens_by_model().get(shown.record.id, 0),
        )

    def _model_json(self, request: Request, shown: Shown) -> Response:
        text = msgspec.json.format(msgspec.json.encode(alternates.as_json(shown))).decode()
        return answer(request, text, "application/json")

    def _model_markdown(self, request: Request, shown: Shown) -> Response:
        values = self._model_values(shown) | {"base": self.base(request)}
        return answer(request, environment().get_template("model.md.j2").render(**values), "text/markdown")

    def _tried(self, id: str) -> Shown:
        """The model to try: the one asked for, or the first that answers.

        Raises:
            ApiError: 404, it does not answer here.
        """
        if not id:
            first = next((shown for shown in self._all() if shown.answers), None)
            if first is None:
                raise ApiError(404, "This server answers for no model: there is none to try.", code="model_not_found")
            return first
        shown = self._one(id)
        if shown is None or not shown.answers:
            raise ApiError(404, f"{id[:120]!r} does not answer here: choose a live model.", code="model_not_found")
        return shown

    async def _try(self, request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise ApiError(403, "This form was sent from another site: use the page itself.", code="cross_site")
        body = await read_body(request, BODY_LIMIT, self.settings.receive_timeout_s)
        id, trial = read_trial(body)
        shown = self._tried(id)
        served = shown.served
        assert served
        if wrong := check_trial(trial):
            return self._playground_page(request, shown, trial, wrong=wrong, status=400)
        caller = f"playground {context_of(request).share}"
        self._allowance.take(caller)
        try:
            outcome = await run_trial(served, trial, caller)
        except ApiError:
            raise
        except UnmaskError as error:
            told = api_error(error)
            return self._playground_page(request, shown, trial, wrong=str(told), status=told.status)
        self.metrics.count_tokens(shown.record.id, outcome.tokens)
        context_of(request).tokens = outcome.tokens
        return self._playground_page(request, shown, trial, outcome=outcome)

    def _playground_page(
        self,
        request: Request,
        shown: Shown,
        trial: Trial,
        *,
        outcome: object = None,
        wrong: str = "",
        status: int = 200,
    ) -> Response:
        return self.render(
            request,
            "playground.html.j2",
            status=status,
            shown=shown,
            record=shown.record,
            live=[other for other in self._all() if other.answers],
            trial=trial,
            outcome=outcome,
            wrong=wrong,
            most_texts=MOST_TEXTS,
            most_characters=MOST_CHARACTERS,
        )

    async def _waiting(self, shown: Shown) -> int:
        if shown.served is None or shown.served.state != "ready":
            return 0
        return (await shown.served.engine()).waiting_tokens()


def website(models: ModelRegistry, settings: ServeSettings, metrics: Metrics, accounts: Accounts | None) -> WebPages:
    """The pages over the catalogue and whatever is served, and with accounts, theirs."""
    seams = account_seams(accounts) if accounts else Seams()
    return Website(models.catalogue, models, settings, metrics, seams, accounts=accounts).site()


@dataclass(frozen=True)
class CategoryRow:
    """A category of a suite, with what was published and what was measured of it."""

    category: str
    expected: int
    published: CategoryScores | None
    measured: CategoryScores | None
    tasks: list[tuple[str, Measurement | None, Measurement | None]]


def _side_by_side(published: SuiteScores | None, measured: SuiteScores | None) -> list[CategoryRow]:
    rows = []
    for at, (category, expected) in enumerate(SUITES[MTEB].items()):
        theirs = published.categories[at] if published else None
        ours = measured.categories[at] if measured else None
        by_task = [{m.what: m for m in scores.tasks} if scores else {} for scores in (theirs, ours)]
        names = dict.fromkeys(name for scores in by_task for name in scores)
        tasks = [(name, by_task[0].get(name), by_task[1].get(name)) for name in names]
        rows.append(CategoryRow(category, expected, theirs, ours, tasks))
    return rows


def _related(shown: Shown, models: Sequence[Shown], most: int = 3) -> list[Shown]:
    """The models that a visitor would look at next: made from the same base, by the same people, of a like size."""
    record = shown.record

    def distance(other: Shown) -> tuple[bool, bool, bool, float]:
        theirs = other.record
        sizes = (record.parameters, theirs.parameters)
        apart = abs(math.log(sizes[0] / sizes[1])) if sizes[0] and sizes[1] else math.inf
        linked = theirs.id in {record.base} or record.id == theirs.base
        return (
            not (linked or (record.base is not None and theirs.base == record.base)),
            theirs.owned_by != record.owned_by,
            theirs.architecture != record.architecture,
            apart,
        )

    return sorted((other for other in models if other.record.id != record.id), key=distance)[:most]
