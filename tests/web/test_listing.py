"""Search, filters, order and comparison by query parameters."""

from collections.abc import Callable

import pytest
from starlette.datastructures import QueryParams
from web_pages import large_catalogue

from tests.api.live import LocalService
from tests.web.conftest import COMING, HTML, REFERENCE
from tests.web.html import Page
from unmask.api.errors import ApiError
from unmask.catalogue import Catalogue, shipped_records
from unmask.router import ModelRegistry
from unmask.web.catalogue.comparison import MAX_MODELS, compare_models
from unmask.web.catalogue.listing import Listing, filter_choices, list_models
from unmask.web.catalogue.model_view import ModelView, model_views
from unmask.web.query import parse_comparison_query, parse_listing_query

ADAPTED = "unmask/smollm2-135m-embed"


@pytest.fixture(scope="module")
def models() -> list[ModelView]:
    """Models with settled figures: one of ours, the published ones, the references."""
    views = model_views(Catalogue.shipped(), ModelRegistry([]))
    return [view for view in views if view.record.owned_by != "unmask" or view.record.id == ADAPTED]


def listing(models: list[ModelView], query: str) -> Listing:
    choices = filter_choices(models)
    return list_models(models, parse_listing_query(QueryParams(query), choices), choices, {})


def ids(models: list[ModelView], query: str) -> list[str]:
    return [view.record.id for view in listing(models, query).rows]


def test_each_filter(models: list[ModelView]) -> None:
    assert len(ids(models, "")) == len(models)
    assert len(ids(models, "status=coming+soon")) == 8
    assert len(ids(models, "status=reference")) == 2
    assert ids(models, "q=sheared+supervised") == [COMING]
    assert ids(models, "q=SHEARED+zebra") == []
    assert len(ids(models, "licence=MIT")) == 8
    assert set(ids(models, "size=small")) == {ADAPTED, REFERENCE, "sentence-transformers/all-mpnet-base-v2"}
    assert ids(models, "dimensions=512") == [REFERENCE]
    assert len(ids(models, "dimensions=more&size=medium")) == 2
    assert len(ids(models, "task=embeddings")) == len(models)
    assert ids(models, "price=set") == [] and len(ids(models, "price=unset")) == len(models)


def test_each_order_puts_what_is_not_known_last(models: list[ModelView]) -> None:
    best = ids(models, "sort=mteb")
    assert best[0].endswith("Llama-3-8B-Instruct-mntp-supervised")
    assert {best[-1], best[-2]} == {ADAPTED, "sentence-transformers/all-mpnet-base-v2"}
    assert ids(models, "sort=local")[:3] == ["sentence-transformers/all-mpnet-base-v2", REFERENCE, ADAPTED]
    assert ids(models, "sort=speed")[0] == REFERENCE
    assert ids(models, "sort=newest")[0] == ADAPTED
    assert ids(models, "sort=size")[0] == REFERENCE
    assert ids(models, "sort=name")[0] == REFERENCE
    assert ids(models, "sort=availability")[0] == ADAPTED


@pytest.mark.parametrize(
    ("query", "message"),
    [("sort=best", "sort='best'"), ("status=popular", "coming soon"), ("page=0", "page='0'"),
     ("page=x", "count from 1"), ("licence=<b>", "licence"), ("sort=votes", "votes"), ("page=" + "9" * 5000, "page"),
     ("page=000001" + "9" * 5000, "page")],
)  # fmt: skip
def test_a_wrong_choice_is_named(models: list[ModelView], query: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        listing(models, query)
    assert error.value.status == 400


def test_addresses_keep_what_was_asked(models: list[ModelView]) -> None:
    query = listing(models, "q=a%26b&sort=mteb").query
    assert query.address(page=2) == "/models?q=a%26b&sort=mteb&page=2"
    assert query.address(q="", sort="availability") == "/models"


def test_pages_of_a_long_list(start: Callable[..., LocalService]) -> None:
    service = start(large_catalogue(120))
    pages = [Page(service.call("GET", f"/models?page={n}", headers=HTML).body.decode()) for n in (1, 2, 3, 99)]
    names = [[a["value"] for a in page.all("input") if a.get("type") == "checkbox"] for page in pages]
    assert [len(page) for page in names] == [50, 50, 21, 21]  # 120 and the model that is served
    assert len({*names[0], *names[1], *names[2]}) == 121


def test_the_form_works_by_its_address(service: LocalService) -> None:
    page = Page(service.call("GET", "/models?q=sheared&status=coming+soon&sort=mteb", headers=HTML).body.decode())
    assert f"2 of {len(shipped_records()) + 2} models" in page.text  # and the two that are served
    chosen = {option["value"] for option in page.all("option") if "selected" in option}
    assert {"coming soon", "mteb"} <= chosen
    nothing = Page(service.call("GET", "/models?q=zebra", headers=HTML).body.decode())
    assert "No model matches all filters" in nothing.text
    refusal = service.call("GET", "/models?status=popular", headers=HTML)
    assert refusal.status == 400 and "choices" in Page(refusal.body.decode()).text


def test_comparison_marks_what_differs_and_what_is_best(models: list[ModelView]) -> None:
    chosen = [next(view for view in models if view.record.id == id) for id in (ADAPTED, REFERENCE, COMING)]
    rows = {(section.title, row.label): row for section in compare_models(chosen) for row in section.rows}
    licence = rows["What they are", "Licence"]
    assert licence.differs and [cell.text for cell in licence.cells] == ["Apache-2.0", "Apache-2.0", "MIT"]
    assert not rows["What they are", "Pooling"].differs
    assert not rows["Word level", "CoNLL2003NER"].differs  # only one is known
    mean = rows["Quality, MTEB English", "Mean of all tasks"]
    assert [(cell.text, cell.best) for cell in mean.cells] == [("", False), ("56.10", False), ("61.85", True)]
    speed = rows["Speed and memory, measured here", "Texts per second"]
    assert [cell.best for cell in speed.cells] == [False, True, False]
    assert ("What they are", "Price per million tokens") not in rows  # nobody has one


def test_comparison_by_address(service: LocalService) -> None:
    path = f"/compare?models={ADAPTED},{REFERENCE}"
    page = Page(service.call("GET", path, headers=HTML).body.decode())
    canonical = next(link["href"] for link in page.all("link") if link["rel"] == "canonical")
    assert canonical == service.url + path
    form = service.call("GET", f"/compare?models={ADAPTED}&models={REFERENCE}", headers=HTML)
    assert form.status == 303 and form.headers["location"] == path
    fewer = Page(service.call("GET", f"{path}&only=differences", headers=HTML).body.decode())
    assert "Pooling" in page.text and "Pooling" not in fewer.text and "Dimensions" in fewer.text
    assert parse_comparison_query(QueryParams("models=a,b,a&models=c")).ids == ["a", "b", "c"]
    with pytest.raises(ApiError, match=f"at most {MAX_MODELS}"):
        parse_comparison_query(QueryParams("models=a,b,c,d,e,f,g"))
    assert service.call("GET", "/compare", headers=HTML).status == 200
    assert service.call("GET", f"/compare?models={ADAPTED}", headers=HTML).status == 200
