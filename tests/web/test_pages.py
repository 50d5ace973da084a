"""Pages of the catalogue over HTTP: content, visitors and formats."""

import json
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from datetime import date
from typing import Literal

import msgspec
import pytest
from starlette.requests import Request

from tests.api.live import KEY, LocalService
from tests.web.conftest import COMING, DEFAULT, HTML, REFERENCE
from tests.web.html import Page
from unmask.catalogue import Catalogue, Event, Measurement, Record, shipped_records
from unmask.catalogue.measurement import PARITY, parity_quantity
from unmask.catalogue.record import Price
from unmask.web import AccountHooks, VoteButton

PAGES = ["/", "/models", f"/models/{COMING}", f"/models/{REFERENCE}", "/models/tiny_llama", "/compare",
         f"/compare?models={DEFAULT},{REFERENCE}", "/docs", "/status", "/playground"]  # fmt: skip


def get(service: LocalService, path: str, **headers: str) -> Page:
    reply = service.call("GET", path, headers=HTML | headers, key=None)
    assert reply.status == 200, (path, reply.body[:300])
    return Page(reply.body.decode())


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole_and_runs_nothing(service: LocalService, path: str) -> None:
    reply = service.call("GET", path, headers=HTML, key=None)
    assert reply.status == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["x-frame-options"] == "DENY"
    page = Page(reply.body.decode())
    for script in page.all("script"):
        assert script.get("src", "").startswith("/static/") or script["type"] == "application/ld+json"
    assert not page.all("style")
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]
    titles = [tag for tag, _ in page.elements if tag == "h1"]
    assert len(titles) == 1
    meta = {m.get("property") or m.get("name"): m["content"] for m in page.all("meta") if "content" in m}
    assert meta["description"] and meta["og:title"] and meta["og:image"].startswith(service.url)
    assert next(link for link in page.all("link") if link["rel"] == "canonical")["href"].startswith(service.url)


def test_every_link_leads_somewhere(service: LocalService) -> None:
    seen = {"/"}
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        reply = service.call("GET", path, headers=HTML, key=None)
        assert reply.status in (200, 303), (path, reply.status)
        if "html" in reply.headers.get("content-type", "") and len(seen) < 150:
            page = Page(reply.body.decode())
            links = [*page.links(), *(link["href"] for link in page.all("link") if link["href"].startswith("/"))]
            waiting += [link for link in links if link not in seen]
            seen.update(links)
    assert {f"/models/{COMING}.json", f"/models/{COMING}.md", "/feed.xml", "/llms.txt", "/openapi.json"} <= seen


def test_a_page_that_has_not_changed_is_not_sent_again(service: LocalService) -> None:
    first = service.call("GET", f"/models/{COMING}", headers=HTML, key=None)
    again = service.call("GET", f"/models/{COMING}", headers={**HTML, "if-none-match": first.headers["etag"]}, key=None)
    assert (again.status, again.body) == (304, b"") and again.headers["content-security-policy"]
    style = next(link["href"] for link in get(service, "/").all("link") if link["rel"] == "stylesheet")
    assert "immutable" in service.call("GET", style).headers["cache-control"]
    assert service.call("GET", "/static/../website.py").status == 404


def test_a_model_that_is_coming_soon(service: LocalService) -> None:
    page = get(service, f"/models/{COMING}")
    for fact in ("coming soon", "1,279,887,360", "2,048", "512", "MIT", "princeton-nlp/Sheared-LLaMA-1.3B", "61.85",
                 "51.44", "Given a web search query", f"unmask serve --model {COMING}", "2404.05961"):  # fmt: skip
        assert fact in page.text, fact
    assert "/v1/embeddings" not in page.text  # there is nothing to call yet
    here = [attributes for _, attributes in page.elements if attributes.get("aria-current") == "step"]
    assert len(here) == 1
    assert not page.all("form")  # without accounts there is no button that does nothing


def test_a_live_model_has_its_call_with_the_visitors_own_address(service: LocalService) -> None:
    page = get(service, "/models/tiny_llama")
    assert f"curl {service.url}/v1/embeddings" in page.text and "live" in page.text
    assert f'base_url="{service.url}/v1"' in page.text
    outside = get(service, "/models/tiny_llama", host="embed.example.org:8443")
    assert "http://embed.example.org:8443/v1/embeddings" in outside.text
    for host in ("evil.org/path", "a b", 'x"onclick', "user@host", "<b>", "a" * 400):
        reply = service.call("GET", "/models/tiny_llama", headers=HTML | {"host": host}, key=None)
        text = reply.body.decode()
        assert host not in text
        assert reply.status == 400 or f"curl {service.url}/v1/embeddings" in text


def test_the_operators_address_comes_first(start: Callable[..., LocalService]) -> None:
    service = start(public_url="https://embed.example.org/")
    page = get(service, "/models/tiny_llama", host="other.example.org")
    assert "https://embed.example.org/v1/embeddings" in page.text and "other.example.org" not in page.text
    assert "https://embed.example.org/models/tiny_llama" in service.call("GET", "/sitemap.xml").body.decode()


def test_the_examples_do_what_they_say(service: LocalService) -> None:
    page = get(service, "/models/tiny_llama")
    codes = page.text.split("a second text")
    assert len(codes) >= 5
    from unmask.web.catalogue.snippets import snippets

    record = msgspec.structs.replace(service.models.list()[0].record, query_instruction="Find it's twin:")
    for snippet in snippets(record, service.url, secured=False):
        if snippet.key == "curl":
            done = subprocess.run(["bash", "-c", snippet.code], capture_output=True, text=True, check=True, timeout=60)
            assert len(json.loads(done.stdout)["data"]) == 2
        elif snippet.key in ("python", "langchain"):
            names: dict[str, object] = {}
            exec(compile(snippet.code, snippet.key, "exec"), names)
            vectors = names["vectors"]
            assert isinstance(vectors, list) and len(vectors) == 2 and len(vectors[0]) == 64


def test_a_models_page_has_the_commands_of_an_export(service: LocalService) -> None:
    page = get(service, "/models/tiny_llama").text
    assert "unmask export tiny_llama --to hub --output tiny_llama" in page
    assert "unmask parity tiny_llama tiny_llama" in page


def test_a_models_page_has_the_parity_of_its_exports(start: Callable[..., LocalService]) -> None:
    def value(kind: Literal["mean", "worst"], cosine: float) -> Measurement:
        return Measurement(
            model="org/x", group=PARITY, what=parity_quantity("llama.cpp", "q8", kind), category="llama.cpp",
            metric="q8", value=cosine, unit="cosine", examples=63, origin="measured", by="unmask",
            on=date(2026, 11, 29), revision="r", hardware="h", command="make parity", raw="docs/parity/results.json",
            note="llama.cpp 1.2",
        )  # fmt: skip

    catalogue = Catalogue.shipped()
    catalogue.put(Record(id="org/x"), [value("mean", 0.9990965), value("worst", 0.998189)])
    service = start(catalogue)
    text = get(service, "/models/org/x").text
    assert re.search(r"llama\.cpp\s*8 bits\s*0\.9981890[^.]*0\.9990965\s*63", text), text
    assert "llama.cpp 1.2" in text and "unmask export org/x --to hub --output x" in text
    assert re.search(r"\| q8 \| 63 \| 0.9990965 \| 0.9981890 \|", service.call("GET", "/models/org/x.md").body.decode())


def test_programs_get_the_same_record(service: LocalService) -> None:
    answer = service.call("GET", f"/models/{COMING}.json").json
    record = shipped_records()[COMING]
    assert answer["id"] == COMING and answer["display_status"] == "coming soon" and answer["state"] is None
    assert answer["parameters"] == record.parameters and answer["about"]["approach"] == record.about.approach
    assert len(answer["measurements"]) == 57
    assert all(m["origin"] == "published" and m["raw"].startswith("https://") for m in answer["measurements"])
    assert answer["means"]["MTEB(eng, v1), published"]["mean"] == pytest.approx(61.85, abs=0.006)
    text = service.call("GET", f"/models/{COMING}.md").body.decode()
    assert text.startswith("# LLM2Vec Sheared-LLaMA") and "| all tasks | 56 | 61.85 |" in text
    assert record.faq[0].question in text


def test_an_alias_leads_to_the_models_one_page(service: LocalService) -> None:
    reply = service.call("GET", "/models/tiny_llama-embed", headers=HTML, key=None)
    assert (reply.status, reply.headers["location"]) == (301, "/models/tiny_llama")


@pytest.mark.parametrize("path", ["/nothing", "/models/no/such", "/models/no/such.json", "/compare?models=no/such"])
def test_what_is_not_there_is_a_page_for_people_and_an_envelope_for_programs(service: LocalService, path: str) -> None:
    reply = service.call("GET", path, headers=HTML, key=None)
    assert reply.status == 404 and "text/html" in reply.headers["content-type"]
    page = Page(reply.body.decode())
    assert "Not found" in page.text and "/models" in page.links()
    assert reply.headers["content-security-policy"]
    answer = service.call("GET", path, key=None)
    assert answer.status == 404 and set(answer.error) == {"message", "type", "param", "code"}


def test_the_api_answers_browsers_as_it_answers_everybody(service: LocalService) -> None:
    assert service.call("GET", "/v1/models/none", headers=HTML).error["code"] == "model_not_found"
    assert service.call("GET", "/").json["embeddings"] == "/v1/embeddings"
    assert service.call("GET", "/v1/models", headers=HTML).json["object"] == "list"


def test_with_keys_the_pages_are_open_and_nothing_else_is(start: Callable[..., LocalService]) -> None:
    service = start(api_keys=(KEY,))
    for path in ("/", "/models", f"/models/{COMING}", f"/models/{COMING}.json", "/compare", "/docs", "/status"):
        assert service.call("GET", path, headers=HTML, key=None).status == 200, path
    assert service.call("GET", "/nothing", headers=HTML, key=None).status == 404
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert service.call("GET", path, headers=HTML, key=None).status == 401, path
    assert service.call("GET", "/", key=None).status == 401  # a program's index, as before
    assert service.call("POST", "/models", {}, key=None).status in (401, 405)
    page = Page(service.call("GET", "/models/tiny_llama", headers=HTML, key=None).body.decode())
    assert "$UNMASK_API_KEY" in page.text and KEY not in page.text
    assert "/playground" not in page.links()
    assert service.call("GET", "/playground", headers=HTML, key=None).status == 404
    assert service.call("GET", "/models?key=abc", headers=HTML, key=None).status == 400


def test_hooks_put_votes_and_links_on_pages(start: Callable[..., LocalService]) -> None:
    async def vote_button(request: Request, record: Record) -> VoteButton:
        return VoteButton(votes=3, action="/account/votes", token="t")

    async def vote_counts() -> dict[str, int]:
        return {REFERENCE: 9}

    hooks = AccountHooks(
        visitor_links=lambda request: [("Sign in", "/account")], vote_button=vote_button, vote_counts=vote_counts
    )
    service = start(None, hooks)
    page = get(service, f"/models/{COMING}")
    assert "/account" in page.links() and "3 votes for this model" in " ".join(page.text.split())
    assert [form["action"] for form in page.all("form")] == ["/account/votes"]
    assert not Page(service.call("GET", "/models/tiny_llama", headers=HTML).body.decode()).all("form")
    first = next(a for a in get(service, "/models?sort=votes").all("input") if a.get("type") == "checkbox")
    assert first["value"] == REFERENCE


def test_structured_data(service: LocalService) -> None:
    page = get(service, f"/models/{COMING}")
    data = json.loads(page.scripts[-1])
    kinds = {node["@type"]: node for node in data["@graph"]}
    assert set(kinds) == {"SoftwareApplication", "BreadcrumbList", "FAQPage"}
    assert kinds["SoftwareApplication"]["url"] == f"{service.url}/models/{COMING}"
    assert "offers" not in kinds["SoftwareApplication"]  # no price has been set, so none is offered
    assert len(kinds["FAQPage"]["mainEntity"]) == len(shipped_records()[COMING].faq)


def test_feeds(service: LocalService) -> None:
    namespace = "{http://www.sitemaps.org/schemas/sitemap/0.9}"
    sitemap = ET.fromstring(service.call("GET", "/sitemap.xml").body)
    places = [node.text or "" for node in sitemap.iter(f"{namespace}loc")]
    assert f"{service.url}/models/{COMING}" in places
    for place in places:
        assert service.call("GET", place.removeprefix(service.url) or "/", headers=HTML).status == 200
    feed = ET.fromstring(service.call("GET", "/feed.xml").body)
    assert {item.findtext("link") for item in feed.iter("item")} >= {f"{service.url}/models/{COMING}"}
    llms = service.call("GET", "/llms.txt").body.decode()
    assert llms.startswith("# unmask\n\n> ") and f"{service.url}/models/{COMING}.md" in llms
    assert "Sitemap:" in service.call("GET", "/robots.txt").body.decode()


def test_prices_and_the_end_of_a_model(start: Callable[..., LocalService]) -> None:
    catalogue = Catalogue.shipped()
    record = catalogue.entries()[0].record
    history = (
        Event(status="live", on=date(2026, 1, 1)),
        Event(status="deprecated", on=date(2026, 2, 1), until=date(2026, 3, 31)),
    )
    prices = (
        Price(nanodollars_per_million_tokens=8_000_000, estimated=True),
        Price(tier="batch", nanodollars_per_million_tokens=4_500_000),
    )
    catalogue.put(msgspec.structs.replace(record, id="tiny_llama", aliases=(), history=history, prices=prices))
    service = start(catalogue)
    page = get(service, "/models/tiny_llama")
    assert "~$0.008" in page.text and "$0.0045" in page.text and "It answers until 31 March 2026" in page.text
    offers = json.loads(page.scripts[-1])["@graph"][0]["offers"]
    assert [offer["price"] for offer in offers] == ["0.008", "0.0045"]
    assert "deprecated" in page.text


def test_status_says_what_happened_and_no_more(start: Callable[..., LocalService]) -> None:
    service = start()
    before = get(service, "/status").text
    assert "tiny_llama" in before and "ready" in before
    service.embed("a text")
    service.embed("a text", model="no/such")
    text = "".join(get(service, "/status").text.split())
    assert "Answered2" in text and "Refused1" in text and "Failed0" in text  # one text warmed the model
    assert re.search(r"\d+to\d+m?s", text)  # which, depends on what else the machine does


def test_the_docs_have_a_part_for_each_dialect_of_the_openapi_document(service: LocalService) -> None:
    parts = {part.get("id") for part in get(service, "/docs").all("div")}
    paths = service.call("GET", "/openapi.json").json["paths"]
    links = {o["externalDocs"]["url"] for methods in paths.values() for o in methods.values() if "externalDocs" in o}
    assert links == {"/docs#azure", "/docs#cohere", "/docs#ollama", "/docs#tei"}
    for anchor in (*links, "/docs#jina"):
        assert anchor.removeprefix("/docs#") in parts


def test_the_documentation_has_every_error_and_this_servers_limits(start: Callable[..., LocalService]) -> None:
    from unmask.api.openapi import ERRORS

    service = start(body_limit_bytes=5_000_000, request_timeout_s=17.0)
    text = get(service, "/docs").text
    for status in ERRORS:
        assert str(status) in text
    assert "5 MB" in text and "17 seconds" in text and "5,000,000 bytes" in text
