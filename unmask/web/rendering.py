"""From a template to a response: the template environment and the HTTP headers of all pages."""

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
    # Only our own script file runs, no other site may frame a page, and forms go to this site only.
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
# Characters that XML 1.0 cannot carry, however they are escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_template(
    request: Request,
    template: str,
    *,
    base: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """Render a template as the response to a request.

    Args:
        request: names the version of the page that the browser has already.
        template: `NAME.html.j2`, which extends `layout.html.j2` and fills its blocks.
        base: address of this server.
        status: HTTP status.
        headers: further headers.
        values: for the template, which escapes them.
    """
    text = environment().get_template(template).render(base=base, path=request.url.path, **values)
    return text_response(request, text, "text/html", status=status, headers=headers)


def text_response(
    request: Request, text: str, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Respond with a text and the headers of a page; with 304 and the headers alone if the browser has this version."""
    content = text.encode()
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    sent = HEADERS | {"cache-control": "no-cache", "etag": tag, "vary": "accept, host"} | dict(headers or {})
    if status == 200 and tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=sent)
    return Response(content, status, sent, media_type=f"{media_type}; charset=utf-8")


def site_url(request: Request, public_url: str | None) -> str:
    """Return the address at which the visitor sees this server, without a slash at its end.

    The operator's setting comes first. The Host header comes from the visitor: it is used only if it has the form of
    a host name, and only on pages for this visitor.
    """
    if public_url:
        return public_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("127.0.0.1", None)
        host = f"{name}:{port}" if port else str(name)
    return f"{request.url.scheme}://{host}"


@cache
def assets() -> dict[str, tuple[bytes, str, str]]:
    """Return the static files: name -> (content, media type, digest)."""
    contents = {}
    for file in files("unmask.web").joinpath("static").iterdir():
        content = file.read_bytes()
        media = _MEDIA.get(file.name.rpartition(".")[2])
        if media:
            contents[file.name] = (content, media, hashlib.blake2b(content, digest_size=6).hexdigest())
    return contents


@cache
def environment() -> Environment:
    """Return the template environment of the pages and the charts."""
    templates = Environment(
        loader=ChoiceLoader([PackageLoader("unmask.web"), PackageLoader("unmask.charts")]),
        # Markdown has an escaping of its own, by the filter `md`.
        autoescape=lambda name: not (name or "").endswith((".md.j2", ".txt.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    templates.globals.update(version=__version__, asset=_asset)
    templates.filters.update(
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
        day=format_day,
        day_of=lambda milliseconds: format_day(datetime.fromtimestamp(milliseconds / 1000, UTC).date()),
        price=format_price,
        dollars=format_amount,
        moment=format_moment,
        iso=lambda milliseconds: datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds"),
        paragraphs=split_paragraphs,
        short=lambda id: id.rpartition("/")[2],
        xml=lambda text: _NOT_XML.sub("", str(text)),
        linked=is_web_address,
        embedded=json_for_script,
    )
    return templates


def json_for_script(value: object) -> Markup:
    """Write JSON for a `script` element that does not run; it cannot contain anything that ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def format_day(value: date | None) -> str:
    """Format a day: 25 November 2026"""
    return f"{value.day} {value:%B} {value.year}" if value else formatting.NO_FIGURE


def format_amount(nano: int) -> str:
    """Format an amount: $0.000000008 and −$12.50, exact, with as many digits as needed"""
    return f"{'−' if nano < 0 else ''}${format_dollars(abs(nano))}"


def format_moment(milliseconds: int) -> str:
    """Format a moment: 25 Nov 2026, 09:15 UTC"""
    at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def format_price(value: Price) -> str:
    """Format a price: $0.008, exact, with as many digits as needed"""
    dollars, rest = divmod(value.nanodollars_per_million_tokens, 10**9)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'~' if value.estimated else ''}${dollars:,}.{digits}"


def split_paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines; blanks inside a paragraph become single spaces."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _asset(name: str) -> str:
    return f"/static/{name}?v={assets()[name][2]}"
