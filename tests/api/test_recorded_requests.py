"""Replay recorded requests against a running server and compare every answer with the recorded one.

`tests/golden/http/` holds one JSON file per request: the kind of server, the request, and the answer. Fields that
differ from run to run (request ids, durations, ports, keys) are replaced by placeholders on both sides. Vectors are
compared within 1e-6, since processors round differently; everything else must be equal, byte for byte.

A change of the answers that is meant is recorded anew, and reviewed as a diff:

    UNMASK_RECORD_HTTP=1 python -m pytest tests/api/test_recorded_requests.py
"""

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection

from tests.api.live import KEY, LocalService, running
from unmask import __version__
from unmask.accounts import Accounts, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings
from unmask.storage.database import now_ms
from unmask.web import website

FOLDER = Path(__file__).parent.parent / "golden" / "http"
RECORDS = sorted(FOLDER.glob("*.json"))
RECORDING = "UNMASK_RECORD_HTTP" in os.environ

# Values of these headers differ from run to run; that they are there, and where, must not.
VOLATILE_HEADERS = {
    "date": "<date>",
    "etag": "<digest>",  # of the body, which is compared itself
    "openai-processing-ms": "<milliseconds>",
    "x-unmask-charge": "<charge>",
    "retry-after": "<seconds>",
    "x-ratelimit-reset-requests": "<duration>",
    "x-ratelimit-reset-tokens": "<duration>",
}
_FLOATS = re.compile(rb'"embedding":(\[[^\]]*\])')
_BASE64 = re.compile(rb'"embedding":"([A-Za-z0-9+/=]*)"')


@dataclass(frozen=True)
class Customer:
    """An account made for one request, and its key."""

    account: str
    key: str


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    folder = tmp_path_factory.mktemp("recorded")
    made = Accounts(f"sqlite:///{folder / 'accounts.sqlite'}", pepper=folder / "pepper")
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, accounts: Accounts) -> Iterator[Callable[[str], LocalService]]:
    """`server(kind)` starts a server of that kind once: `open` with pages, `keyed`, `accounts` with pages."""
    started: dict[str, LocalService] = {}
    with ExitStack() as stack:

        def start(kind: str) -> LocalService:
            if kind not in started:
                started[kind] = stack.enter_context(
                    {
                        "open": lambda: running(tiny_llama, None, website, api_keys=()),
                        "keyed": lambda: running(tiny_llama, max_request_tokens=600, max_request_characters=4000),
                        "accounts": lambda: running(
                            tiny_llama,
                            accounts,
                            website,
                            api_keys=(),
                            accounts_url="kept by the test",
                            credit_status=402,
                        ),
                    }[kind]()
                )
                if kind == "accounts":
                    with accounts.database.begin() as connection:
                        for tier, price in (("default", 8_000_000), ("batch", 3_500_000)):
                            tariff.set_price(connection, tariff.TariffPrice("tiny_llama", tier, price), now_ms())
            return started[kind]

        yield start


def customer(accounts: Accounts, name: str, credit: int, **settings: Any) -> Customer:
    """Open an account with `credit` nano-dollars, and create a key with `settings`."""

    def make(connection: Connection) -> Customer:
        account = people.open_account(connection, name, now_ms())
        if credit:
            ledger.top_up(connection, account, credit, f"payment of {account}", now_ms())
        settings_ = KeySettings(**settings)
        return Customer(account, keys.create(connection, accounts.peppers, account, settings_, now_ms()))

    with accounts.database.begin() as connection:
        return make(connection)


def send(service: LocalService, request: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Send a recorded request, with `names` in place of the placeholders, and return its answer with placeholders."""
    headers = {name: _filled(value, names) for name, value in request["headers"].items()}
    body = request.get("body")
    connection = HTTPConnection(*service.address, timeout=60)
    try:
        connection.request(request["method"], request["path"], body.encode() if body is not None else None, headers)
        answer = connection.getresponse()
        content = answer.read()
        own_id = headers.get("x-request-id")
        received = [[name.lower(), value] for name, value in answer.getheaders()]
        return {
            "status": answer.status,
            "headers": [[name, _header(name, value, names, own_id)] for name, value in received],
            "vectors": _vectors(content),
            "body": _body(content, names),
        }
    finally:
        connection.close()


def _filled(text: str, names: dict[str, str]) -> str:
    for placeholder, value in names.items():
        text = text.replace(placeholder, value)
    return text


def _masked(text: str, names: dict[str, str]) -> str:
    for placeholder, value in names.items():
        text = text.replace(value, placeholder)
    return text


def _header(name: str, value: str, names: dict[str, str], own_id: str | None) -> str:
    if name == "x-request-id" and value != own_id:
        return re.sub(r"^req_[0-9a-f]{32}$", "<request id>", value)
    if name == "set-cookie":
        return re.sub(r"=[\w-]+;", "=<cookie>;", value, count=1)
    if name == "content-length":
        return "<bytes>"  # of a body with volatile fields; without them the body itself is compared
    return _masked(VOLATILE_HEADERS.get(name, value), names)


def _body(content: bytes, names: dict[str, str]) -> str:
    content = _FLOATS.sub(b'"embedding":[<vector>]', content)
    content = _BASE64.sub(b'"embedding":"<vector>"', content)
    text = _masked(content.decode(), names)
    text = re.sub(r"(try again in )[\dms.]+\.", r"\1<duration>.", text)
    text = re.sub(r'("(?:created|last_used|expires)":)[1-9]\d*', r"\1<seconds>", text)
    text = re.sub(r"(/static/[\w.-]+\?v=)\w+", r"\1<digest>", text)
    return re.sub(r'(name="token" value=")[^"]*', r"\1<token>", text)


def _vectors(content: bytes) -> list[list[float]]:
    floats = [json.loads(match) for match in _FLOATS.findall(content)]
    packed = [np.frombuffer(base64.b64decode(match), dtype="<f4").tolist() for match in _BASE64.findall(content)]
    return floats + packed


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_the_answer_is_the_recorded_one(server: Callable[[str], LocalService], accounts: Accounts, file: Path) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    service = server(record["server"])
    host, port = service.address
    names = {"<url>": service.url, "<address>": f"{host}:{port}", "<version>": __version__}
    if record["server"] == "keyed":
        names["<key>"] = KEY
    elif settings := record.get("customer"):
        made = customer(accounts, **settings)
        names |= {"<key>": made.key, "<key id>": keys.key_id(made.key), "<account>": made.account}
    answers = [send(service, record["request"], names) for _ in range(record.get("times", 1))]
    answer = answers[-1]
    if RECORDING:
        record["answer"] = answer
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    expected = record["answer"]
    assert (answer["status"], answer["headers"]) == (expected["status"], expected["headers"])
    assert answer["body"] == expected["body"]
    assert [len(vector) for vector in answer["vectors"]] == [len(vector) for vector in expected["vectors"]]
    for vector, recorded in zip(answer["vectors"], expected["vectors"], strict=True):
        np.testing.assert_allclose(vector, recorded, rtol=0, atol=1e-6)


def test_there_are_twenty_records_or_more() -> None:
    assert len(RECORDS) >= 20
