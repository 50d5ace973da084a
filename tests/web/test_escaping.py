"""Escaping: markup in any field of a record or measurement comes out as text in every format of every page."""

import json
import types
import typing
import xml.etree.ElementTree as ET
from collections.abc import Callable
from datetime import date
from typing import Any, Literal, get_args, get_origin
from urllib.parse import quote

import msgspec
import pytest

from tests.api.live import LocalService
from tests.web.conftest import HTML
from tests.web.html import Page
from unmask.catalogue import Catalogue, Event, Measurement, Record

POISON = (
    """"'></script></title></textarea><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}\u2028\x01&amp; """
)
TAGS = {"img"}  # no page of ours has these


def poisoned(kind: Any, name: str = "") -> Any:
    """Build a value of a type with markup in every text; the address of a link stays an address."""
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return poisoned(next(option for option in get_args(kind) if option is not types.NoneType), name)
    if origin is Literal:
        return get_args(kind)[0]
    if origin is tuple:
        items = get_args(kind)
        return (poisoned(items[0], name),) if len(items) == 2 and items[1] is ... else tuple(map(poisoned, items))
    if kind is str:
        return "https://example.org/a" if name == "url" else POISON + name
    if kind is int:
        return 7
    if kind is float:
        return 7.0
    if kind is bool:
        return True
    if kind is date:
        return date(2026, 1, 1)
    hints = typing.get_type_hints(kind)
    return kind(**{field: poisoned(hints[field], field) for field in kind.__struct_fields__ if field != "canary"})


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    hints = typing.get_type_hints(Record)
    fields = {
        name: poisoned(hints[name], name) for name in Record.__struct_fields__ if name not in ("canary", "history")
    }
    history = (Event(status="requested", on=date(2026, 1, 1), note=POISON),)
    record = Record(**fields | {"history": history, "matryoshka": (3,), "role": "offered"})
    texts = json.dumps(msgspec.to_builtins(record)).count("onerror=alert(2)")
    assert texts == 28  # every field that can hold a text holds this one
    values = {"model": record.id, "value": 50.0, "unit": POISON, "by": POISON, "on": date(2026, 1, 1), "metric": POISON,
              "revision": POISON, "hardware": POISON, "command": POISON, "raw": POISON, "note": POISON}  # fmt: skip
    things = [("MTEB(eng, v1)", POISON, "STS"), ("local", POISON, "STS"), ("local", "STS12", "STS"),
              ("word level", POISON, "WordLevel"), ("MTEB(eng, v1)", "mean" + POISON, "")]  # fmt: skip
    measurements = [
        Measurement(**values, group=group, what=what, category=category, origin=origin)  # pyright: ignore
        for group, what, category in things
        for origin in ("measured", "published")
    ]
    measurements += [
        Measurement(**values, group="cost", what=what, origin="measured")  # pyright: ignore[reportArgumentType]
        for what in ("texts per second", "tokens per second", "peak resident memory")
    ]
    made = Catalogue.shipped()
    made.put(record, measurements)
    plain = msgspec.structs.replace(record, id="org/plain", aliases=(), base=record.base)
    made.put(plain, [msgspec.structs.replace(m, model="org/plain") for m in measurements])
    return made


@pytest.fixture
def service(start: Callable[..., LocalService], catalogue: Catalogue) -> LocalService:
    return start(catalogue)


def test_no_field_becomes_markup(service: LocalService, catalogue: Catalogue) -> None:
    evil = next(entry.record.id for entry in catalogue.entries() if POISON in entry.record.id)
    path = quote(evil)
    other = quote(evil, safe="")
    pages = ["/", "/models", "/models?sort=name", f"/models/{path}", "/models/org/plain", "/playground", "/status",
             f"/compare?models=org/plain,{other},unmask/smollm2-135m-embed", f"/models?q={quote(POISON)}",
             f"/compare?models={quote('no' + POISON)}", f"/models?status={quote(POISON)}", f"/{quote(POISON)}",
             f"/playground?model={quote(POISON)}", f"/models/{quote('no' + POISON)}"]  # fmt: skip
    poisoned_pages = 0
    for where in pages:
        reply = service.call("GET", where, headers=HTML)
        assert reply.status in (200, 400, 404), (where, reply.status)
        text = reply.body.decode()
        page = Page(text)
        poisoned_pages += "<img src=x onerror=alert(2)>" in page.text
        assert "49" not in page.text.split("{{7*7}}")[0][-20:] and "<script>alert" not in text.lower()
        for tag, attributes in page.elements:
            assert tag not in TAGS, where
            assert not [name for name in attributes if name.startswith("on")], where
            for name in ("href", "src", "action"):
                target = attributes.get(name, "/")
                assert target.startswith(("/", "#", "https://", service.url)), (where, target)
        for script, content in zip(page.all("script"), page.scripts, strict=True):
            assert script.get("src", "").startswith("/static/") or json.loads(content)["@graph"]
    assert poisoned_pages >= 8  # it is all there, as text


def test_no_field_breaks_the_other_forms(service: LocalService, catalogue: Catalogue) -> None:
    evil = next(entry.record.id for entry in catalogue.entries() if POISON in entry.record.id)
    for path in ("/feed.xml", "/sitemap.xml"):
        ET.fromstring(service.call("GET", path).body)
    answer = service.call("GET", f"/models/{quote(evil)}.json")
    assert answer.json["id"] == evil and answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (f"/models/{quote(evil)}.md", "/llms.txt"):
        reply = service.call("GET", path)
        text = reply.body.decode()
        assert reply.headers["content-type"].startswith(("text/markdown", "text/plain"))
        assert "<script>" not in text and "<img" not in text


def test_forms_give_back_what_was_typed_as_text(service: LocalService) -> None:
    body = f"model=tiny_llama&texts={quote(POISON)}%0Aanother&query={quote(POISON)}".encode()
    headers = {**HTML, "content-type": "application/x-www-form-urlencoded"}
    page = Page(service.call("POST", "/playground", body, headers).body.decode())
    assert not [tag for tag, _ in page.elements if tag in TAGS] and "onerror=alert(2)" in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
