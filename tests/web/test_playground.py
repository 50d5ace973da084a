"""The playground's form over HTTP."""

from collections.abc import Callable
from urllib.parse import urlencode

import numpy as np
import pytest

from tests.api.live import KEY, LocalService, Reply
from tests.web.conftest import HTML
from tests.web.html import Page
from unmask import Encoder
from unmask.api.errors import ApiError
from unmask.web.catalogue.playground import TrialLimit


def post(service: LocalService, texts: str, query: str = "", model: str = "tiny_llama", **headers: str) -> Reply:
    body = urlencode({"model": model, "texts": texts, "query": query}).encode()
    sent = {**HTML, "content-type": "application/x-www-form-urlencoded", **headers}
    return service.call("POST", "/playground", body, sent, key=None)


def test_similarities_are_those_of_the_vectors(service: LocalService, golden_dir) -> None:
    texts = ["one text", "another text", "something else"]
    reply = post(service, "\n".join([*texts, "  ", ""]), "one more text")
    assert reply.status == 200
    encoder = Encoder.load(golden_dir / "tiny_llama")
    vectors = encoder.encode([*texts, "one more text"], normalize=True)
    text = Page(reply.body.decode()).text
    for value in (vectors[:3] @ vectors[:3].T).ravel():
        assert f"{value:.2f}".replace("-", "−") in text
    order = np.argsort(-(vectors[:3] @ vectors[3]))
    nearest = text[text.rindex("Nearest to the query") : text.index("How alike the texts")]
    places = [nearest.index(texts[at]) for at in order]
    assert places == sorted(places)
    assert "tokens read" in text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "at least two"),
        ("only one", "at least two"),
        ("a\n" * 13, "13 lines"),
        ("a\n" + "b" * 1001, "1,001 characters"),
    ],
)
def test_too_little_and_too_much_is_said_on_the_page(service: LocalService, texts: str, message: str) -> None:
    reply = post(service, texts)
    page = Page(reply.body.decode())
    assert reply.status == 400 and message in page.text
    assert any(attributes.get("role") == "alert" for _, attributes in page.elements)
    assert texts.strip()[:50] in page.text  # nothing that was typed is lost


def test_only_live_models_can_be_tried(service: LocalService) -> None:
    assert post(service, "a\nb", model="unmask/smollm2-135m-embed").status == 404
    assert post(service, "a\nb", model="no/such").status == 404
    assert service.call("GET", "/playground?model=tiny_gemma", headers=HTML, key=None).status == 200


def test_a_form_from_another_site_and_a_form_that_is_none(service: LocalService) -> None:
    assert post(service, "a\nb", **{"sec-fetch-site": "cross-site"}).status == 403
    headers = {**HTML, "content-type": "application/x-www-form-urlencoded"}
    assert service.call("POST", "/playground", b"texts=\xff", headers, key=None).status in (400, 404)
    assert service.call("POST", "/playground", b"a=1&" * 50, headers, key=None).status == 400
    assert service.call("POST", "/playground", b"x" * 70_000, headers, key=None).status == 413


def test_a_visitor_may_try_so_often() -> None:
    limit = TrialLimit(per_minute=3)
    for _ in range(3):
        limit.take("a", now=0)
    with pytest.raises(ApiError, match="wait 20 seconds") as error:
        limit.take("a", now=0)
    assert error.value.status == 429 and error.value.retry_after == pytest.approx(20)
    limit.take("b", now=0)
    limit.take("a", now=20.5)


def test_keys_close_it_unless_the_operator_opens_it(start: Callable[..., LocalService]) -> None:
    service = start(api_keys=(KEY,), playground=True)
    assert post(service, "a\nb").status == 200
    closed = start(playground=False)
    assert closed.call("GET", "/playground", headers=HTML, key=None).status == 404
