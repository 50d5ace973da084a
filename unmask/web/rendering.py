"""From a template to a response: one environment, one set of headers, for every page of every room."""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from unmask import __version__
from unmask.accounts.money import format_dollars
from unmask.catalogue.record import Price, is_web_address
from unmask.charts import formatting
from unmask.evaluate.report.report_model import CATEGORY_NAMES

HEADERS = {
    # Nothing runs in a page but our own file, nothing frames it, and no form leaves for elsewhere.
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "strict-origin-when-cross-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_MEDIA = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "png": "image/png"}
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
# What XML 1.0 cannot carry, however it is escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def page(
    request: Request,
    template: str,
    *,
    base: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """A template as the answer to a request.

    Args:
        request: tells what the visitor's browser has already.
        template: `NAME.html.j2`, which extends `layout.html.j2` and fills its blocks.
        base: address of this server.
        status: of the answer.
        headers: further ones.
        values: for the template; every one is escaped there.
    """
    text = environment().get_template(template).render(base=base, path=request.url.path, **values)
    return answer(request, text, "text/html", status=status, headers=headers)


def answer(
    request: Request, text: str, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A text with the headers of a page; nothing but them if the visitor has it already."""
    content = text.encode()
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    sent = HEADERS | {"cache-control": "no-cache", "etag": tag, "vary": "accept, host"} | dict(headers or {})
    if status == 200 and tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=sent)
    return Response(content, status, sent, media_type=f"{media_type}; charset=utf-8")


def base_url(request: Request, public: str | None) -> str:
    """The address under which the visitor sees this server, without a slash at its end.

    The operator's own word comes first. A Host header is the visitor's, so it is believed only as far as it can
    be nothing but a host, and shown to nobody else.
    """
    if public:
        return public.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("127.0.0.1", None)
        host = f"{name}:{port}" if port else str(name)
    return f"{request.url.scheme}://{host}"


@cache
def assets() -> dict[str, tuple[bytes, str, str]]:
    """The files that pages refer to: name -> (content, media type, digest)."""
    found = {}
    for file in files("unmask.web").joinpath("static").iterdir():
        content = file.read_bytes()
        media = _MEDIA.get(file.name.rpartition(".")[2])
        if media:
            found[file.name] = (content, media, hashlib.blake2b(content, digest_size=6).hexdigest())
    return found


@cache
def environment() -> Environment:
    """All templates of this room, and the report's charts."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader("unmask.web"), PackageLoader("unmask.charts")]),
        # Markdown is the one format that has an escaping of its own.
        autoescape=lambda name: not (name or "").endswith((".md.j2", ".txt.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    made.globals.update(version=__version__, asset=_asset)
    made.filters.update(
        score=formatting.score,
        interval=formatting.interval,
        metric=formatting.metric,
        count=formatting.count,
        magnitude=formatting.magnitude,
        duration=formatting.duration,
        listed=formatting.listed,
        breakable=formatting.breakable,
        md=formatting.markdown,
        plural=formatting.plural,
        shortened=formatting.shortened,
        category=lambda name: CATEGORY_NAMES.get(name, name),
        day=day,
        day_of=lambda milliseconds: day(datetime.fromtimestamp(milliseconds / 1000, UTC).date()),
        price=price,
        dollars=dollars,
        moment=moment,
        iso=lambda milliseconds: datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds"),
        paragraphs=paragraphs,
        short=lambda id: id.rpartition("/")[2],
        xml=lambda text: _NOT_XML.sub("", str(text)),
        linked=is_web_address,
        embedded=embedded,
    )
    return made


def embedded(value: object) -> Markup:
    """JSON inside a `script` element of a kind that does not run: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def day(value: date | None) -> str:
    """25 November 2026"""
    return f"{value.day} {value:%B} {value.year}" if value else formatting.NO_FIGURE


def dollars(nano: int) -> str:
    """$0.000000008 and −$12.50: exactly, with as many digits as it takes"""
    return f"{'−' if nano < 0 else ''}${format_dollars(abs(nano))}"


def moment(milliseconds: int) -> str:
    """25 Nov 2026, 09:15 UTC"""
    at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def price(value: Price) -> str:
    """$0.008, exactly, with as many digits as it takes"""
    dollars, rest = divmod(value.nanodollars_per_million_tokens, 10**9)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'~' if value.estimated else ''}${dollars:,}.{digits}"


def paragraphs(text: str) -> list[str]:
    """A text's paragraphs, which blank lines part."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _asset(name: str) -> str:
    return f"/static/{name}?v={assets()[name][2]}"
