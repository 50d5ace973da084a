"""The list of faults that a provider can have, each against a real server with accounts: answer, attempts, breaker,
books and costs, and another caller who must not notice.

Faults on the wire are in `WIRE`, here. The others have tests of their own, which `ELSEWHERE` names.
"""

import asyncio
import base64
import gzip
import importlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from starlette.requests import ClientDisconnect, Request

from tests.api.live import Reply, running, until
from tests.router.fault_server import (
    Behaviour,
    FaultServer,
    SeenRequest,
    VectorsOf,
    after,
    changed,
    envelope,
    fault_server_thread,
    reply,
    reset,
    right,
    right_then_close,
    silent,
)
from tests.router.test_outbound import certificate
from tests.router.test_providers import MODEL, SLOW, TEXTS, Upstreams, customer, providers_file
from unmask.accounts import Accounts, money, people
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.costs import FREE_OUTCOMES
from unmask.accounts.keys import KeySettings
from unmask.accounts.verification import verify
from unmask.api import embeddings
from unmask.encoder import Encoder
from unmask.router import attempts, daily_cost, load
from unmask.router import endpoint as endpoint_module
from unmask.router.outbound import ProviderClient
from unmask.router.verdicts import order_admission
from unmask.storage.schema import provider_attempts

CREDIT = 1_000_000_000
PRICE, COST = 8, 4_000_000  # nano-dollars of a token here; of a million tokens at either provider
SECRET = "sk-provider-0123456789abcdef"


async def endless(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
    """Promise ten gigabytes of JSON, and write them for as long as anybody reads."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10000000000\r\n\r\n")
    while True:
        writer.write(b" " * 65_536)
        await writer.drain()


def rows(change: Callable[[np.ndarray], np.ndarray], dtype: str = "<f4") -> Behaviour:
    """Answer with the right vectors [n, dim], changed, in a number format."""

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        vectors = change(server.vectors_of(request.texts, ""))
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if np.isfinite(vectors).all() else vectors
        answer = envelope(list(vectors))
        for item, row in zip(answer["data"], vectors, strict=True):
            item["embedding"] = base64.b64encode(row.astype(dtype).tobytes()).decode()
        return await reply(answer)(server, request, writer)

    return behave


def to_callers(behaviour: Behaviour, times: int) -> Behaviour:
    """Behave so to so many requests of callers; answer canaries, and everything after that, rightly."""
    left = [behaviour] * times

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        is_callers = set(request.texts) <= {*TEXTS}
        return await (left.pop() if left and is_callers else right)(server, request, writer)

    return behave


def usage(**counts: int) -> Behaviour:
    return changed(lambda answer: answer | {"usage": counts})


def busy(retry_after: str | None) -> Behaviour:
    return reply({}, 429, {"retry-after": retry_after} if retry_after is not None else None)


def in_a_minute() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)


def no_data(answer: dict[str, Any]) -> None:
    answer["data"].pop()


def one_more(answer: dict[str, Any]) -> None:
    answer["data"].append(answer["data"][0])


def same_index(answer: dict[str, Any]) -> None:
    answer["data"][1]["index"] = 0


def gap(answer: dict[str, Any]) -> None:
    answer["data"][1]["index"] = 7


@dataclass(frozen=True)
class Fault:
    """A fault of provider a, and what is left of it.

    Attributes:
        number: in the list of faults.
        behaviour: of its next answer.
        outcome: of the attempt; "answered" where it is no fault after all.
        breaker: its state afterwards.
        checked: a full run of the canaries follows.
    """

    number: int
    behaviour: Behaviour
    outcome: str
    breaker: str = "closed"
    checked: bool = False


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
WIRE: dict[str, Fault] = {
    "says nothing": Fault(2, silent, "timeout"),
    "reset in the headers": Fault(3, reset(b"HTTP/1.1 200 OK\r\ncontent-"), "cut_off"),
    "reset in the body": Fault(4, reset(HEAD + b'{"data":'), "cut_off"),
    "a byte at a time": Fault(5, reply({}, dots=0.2), "timeout"),
    "a redirect to metadata": Fault(9, reply(b"", 302, {"location": "http://169.254.169.254/"}), "failed"),
    "a gzip bomb": Fault(10, reply(gzip.compress(b" " * 50_000_000), headers={"content-encoding": "gzip"}), "failed"),
    "ten gigabytes": Fault(10, endless, "malformed", checked=True),
    "a header of a megabyte": Fault(10, reply({}, headers={"x-large": "x" * 1_000_000}), "failed"),
    "HTML": Fault(11, reply(b"<html>Welcome</html>", headers={"content-type": "text/html"}), "failed"),
    "half of the JSON": Fault(11, changed(lambda answer: json.dumps(answer)[:-20].encode()), "malformed", checked=True),
    "deep JSON": Fault(11, reply(b"[" * 50_000), "malformed", checked=True),
    "one vector less": Fault(12, changed(no_data), "malformed", checked=True),
    "one vector more": Fault(12, changed(one_more), "malformed", checked=True),
    "an index twice": Fault(12, changed(same_index), "malformed", checked=True),
    "a gap": Fault(12, changed(gap), "malformed", checked=True),
    "another order": Fault(12, changed(lambda answer: answer["data"].reverse()), "answered"),
    "NaN": Fault(13, rows(lambda vectors: vectors * np.nan), "malformed", checked=True),
    "infinity": Fault(13, rows(lambda vectors: vectors + np.inf), "malformed", checked=True),
    "zeros": Fault(13, changed(lambda answer: envelope([np.zeros(64)] * 2)), "malformed", checked=True),
    "one number less": Fault(13, rows(lambda vectors: vectors[:, 1:]), "malformed", checked=True),
    "float16": Fault(13, rows(lambda vectors: vectors, "<f2"), "malformed", checked=True),
    "big-endian": Fault(13, rows(lambda vectors: vectors, ">f4"), "malformed", checked=True),
    "busy for a second": Fault(14, busy("1"), "rate_limited"),
    "busy until a date": Fault(14, busy(in_a_minute()), "rate_limited"),
    "busy": Fault(14, busy(None), "rate_limited"),
    "busy for ever": Fault(14, busy("9" * 400), "rate_limited"),
    "no credit": Fault(16, reply({}, 402), "no_access", "held"),
    "no such key": Fault(16, reply({}, 401), "no_access", "held"),
    "forbidden": Fault(16, reply({}, 403), "no_access", "held"),
    "no such model": Fault(16, reply({}, 404), "no_access", "held"),
    "too large": Fault(16, reply({}, 413), "rejected"),
    "invalid": Fault(16, reply({}, 422), "rejected"),
    "no usage": Fault(23, changed(lambda answer: {"data": answer["data"]}), "answered"),
    "usage of nothing": Fault(23, usage(prompt_tokens=0, total_tokens=0), "answered"),
    "ten times the usage": Fault(23, usage(prompt_tokens=900, total_tokens=900), "answered"),
    "usage beyond 64 bits": Fault(23, usage(prompt_tokens=10**24), "answered"),
    "usage that overflows sums": Fault(23, usage(prompt_tokens=9 * 10**18), "answered"),
    "negative usage": Fault(23, usage(prompt_tokens=-7), "answered"),
    "echoes the key": Fault(24, reply({"error": {"message": f"wrong {SECRET} {TEXTS[0]}"}}, 401), "no_access", "held"),
}  # fmt: skip

# The other numbers of the list, and who tests them.
ELSEWHERE: dict[int, str] = {
    1: "tests.router.test_faults:test_nobody_there_moves_the_request",
    6: "tests.router.test_faults:test_a_kept_connection_that_was_closed_is_asked_again_over_a_new_one",
    7: "tests.router.test_faults:test_certificates_that_do_not_fit_move_the_request",
    8: "tests.router.test_faults:test_nobody_there_moves_the_request",
    15: "tests.router.test_faults:test_a_storm_of_refusals_loses_traffic",
    17: "tests.router.test_faults:test_a_provider_that_fails_half_of_the_time_is_out",
    18: "tests.router.test_faults:test_a_provider_that_becomes_slow_loses_its_traffic_until_it_recovers",
    19: "tests.router.test_faults:test_one_canary_decides_about_recovery_under_load",
    20: "tests.router.test_faults:test_with_all_down_nothing_is_charged",
    21: "tests.router.test_faults:test_many_short_deadlines_blame_nobody",
    22: "tests.router.test_faults:test_a_caller_who_leaves_at_any_await_pays_for_a_settled_answer_alone",
    25: "tests.accounts.test_chaos:test_every_answer_is_charged_exactly_once_and_every_cost_booked_once",
    26: "tests.router.test_faults:test_a_quarantine_moves_the_requests_of_another_process",
    27: "tests.router.test_faults:test_a_clock_that_jumps_changes_no_answer_and_no_charge",
    28: "tests.router.test_faults:test_every_mistake_of_the_bank_is_named_and_costs_no_caller",
    29: "tests.router.test_faults:test_noise_batch_and_state_are_named_and_cost_no_caller",
    30: "tests.router.test_faults:test_noise_batch_and_state_are_named_and_cost_no_caller",
    31: "tests.router.test_faults:test_a_provider_that_begins_to_recognise_canaries_is_out_at_its_next_check",
    32: "tests.router.test_providers:test_a_provider_that_drifts_under_load_is_out_after_two_light_runs",
}


def test_every_fault_of_the_list_is_tested() -> None:
    assert {fault.number for fault in WIRE.values()} | set(ELSEWHERE) == set(range(1, 33))
    for place in ELSEWHERE.values():
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def cost_of(row: Any) -> int:
    """The nano-dollars of an attempt that a provider bills: by its own count, unless that is absurd."""
    theirs: int | None = row.their_tokens
    if theirs is not None and row.tokens <= 2 * theirs <= 4 * row.tokens:
        return money.cost(theirs, COST)
    return money.cost(row.tokens, COST)


class Books:
    """Two scripted providers, a server with accounts before them, and its books."""

    def __init__(
        self, upstreams: Upstreams, accounts: Accounts, account: str, key: str, options: dict[str, Any]
    ) -> None:
        self.upstreams, self.accounts, self.account, self.key = upstreams, accounts, account, key
        self.options = options  # of the server
        self.a = upstreams.endpoint("a")
        self.client = self.a.client

    def embed(self, texts: Sequence[str] = TEXTS[:2], headers: dict[str, str] | None = None, **fields: Any) -> Reply:
        body = {"model": MODEL, "input": texts} | fields
        return self.upstreams.service.call("POST", "/v1/embeddings", body, headers, self.key)

    def balance(self) -> int:
        """The balance once nothing is held any more; the books must be right then."""

        def held() -> int:
            with self.accounts.database.read() as connection:
                return people.account(connection, self.account).held

        until(lambda: held() == 0)
        with self.accounts.database.read() as connection:
            assert verify(connection).drift == ()
            return people.account(connection, self.account).balance

    def attempts(self, charge: str) -> list[Any]:
        with self.accounts.database.read() as connection:
            table = provider_attempts.c
            return list(
                connection.execute(sa.select(provider_attempts).where(table.charge == charge).order_by(table.id))
            )

    def later_attempts(self, than: int, *, probes: bool = False) -> list[Any]:
        """All attempts after the one with this id: those for requests, failed ones included, or canaries."""
        self._await_writes()
        table = provider_attempts.c
        query = sa.select(provider_attempts).where(table.id > than, (table.reason == "probe") == probes)
        with self.accounts.database.read() as connection:
            return list(connection.execute(query.order_by(table.id)))

    def last_attempt(self) -> int:
        self._await_writes()
        with self.accounts.database.read() as connection:
            return connection.execute(sa.select(sa.func.max(provider_attempts.c.id))).scalar() or 0

    def _await_writes(self) -> None:
        """Wait for the rows that nobody waits for: the writer takes one after the other."""
        self.accounts._writer.submit(lambda connection: None).result()

    def check(self, name: str, *, light: bool = False) -> None:
        """Let a provider be asked for canaries now: for all of them, or as a health check."""
        endpoint = self.upstreams.endpoint(name)

        def ask() -> None:
            if light:
                endpoint.breaker._state, endpoint.breaker._until = "open", 0.0
            endpoint.full_due = not light
            endpoint.wake.set()

        self.upstreams.in_loop(ask)

    def readmit(self, name: str) -> None:
        """End a quarantine as the operator does, in all processes."""
        with self.accounts.database.begin() as connection:
            order_admission(connection, COMMAND_LINE, name, MODEL)
        until(lambda: self.upstreams.endpoint(name).admission == "admitted")

    def expect_quarantine(self, vectors_of: VectorsOf) -> str:
        """Let provider b answer so: its next full run takes it out, and callers do not notice. Returns its fault."""
        b, endpoint = self.upstreams.b, self.upstreams.endpoint("b")
        honest, before, last = b.vectors_of, self.balance(), self.last_attempt()
        b.vectors_of = vectors_of
        try:
            self.check("b")
            until(lambda: endpoint.admission == "quarantined")
            got = self.embed(provider={"order": ["b"]})
        finally:
            b.vectors_of = honest
        assert (got.status, got.headers["x-unmask-provider"], got.headers["x-unmask-attempts"]) == (200, "a", "1")
        np.testing.assert_allclose(got.vectors, RIGHT[0], atol=1e-6)
        assert endpoint.breaker.state == "closed"
        tokens = got.json["usage"]["total_tokens"]
        assert before - self.balance() == PRICE * tokens
        (answered,) = self.attempts(got.headers["x-unmask-charge"])
        assert (answered.provider, answered.outcome, answered.cost) == ("a", "answered", cost_of(answered))
        probes = [row for row in self.later_attempts(last, probes=True) if row.provider == "b"]
        assert {(row.charge, row.outcome) for row in probes} == {(None, "answered")}
        assert sum(row.tokens for row in probes) > 5_000 and all(row.cost > 0 for row in probes)
        return endpoint.finding.removeprefix("b ")

    def connect_to(self, stack: ExitStack, **fields: Any) -> None:
        """Let provider a be elsewhere until the stack is closed, with its vectors still admitted."""
        client = ProviderClient(msgspec.structs.replace(self.client.provider, **fields))
        self.a.client = client

        loop = next(iter(self.upstreams.pool._watches)).get_loop()
        stack.callback(lambda: asyncio.run_coroutine_threadsafe(client.close_when_idle(), loop).result())
        stack.callback(setattr, self.a, "client", self.client)

    def expect(self, outcome: str, headers: dict[str, str] | None = None) -> None:
        """Send a request that prefers provider a, and check answer, attempts and books; others must not notice."""
        before = self.balance()
        with ThreadPoolExecutor(1) as another:
            quiet = another.submit(self.embed, TEXTS[2:4], provider={"only": ["b"]})
            got = self.embed(headers=headers, provider={"order": ["a"]})
            calm = quiet.result()
        assert got.status == 200, got.body
        assert (calm.status, calm.headers["x-unmask-attempts"]) == (200, "1")
        moved = outcome != "answered"
        assert (got.headers["x-unmask-provider"], got.headers["x-unmask-attempts"]) == (
            ("b", "2") if moved else ("a", "1")
        )
        np.testing.assert_allclose(got.vectors, RIGHT[0], atol=1e-6)
        tokens, others = got.json["usage"]["total_tokens"], calm.json["usage"]["total_tokens"]
        assert before - self.balance() == PRICE * (tokens + others)
        first, *more = self.attempts(got.headers["x-unmask-charge"])
        free = outcome in FREE_OUTCOMES
        assert (first.provider, first.outcome, first.reason) == ("a", outcome, "answer")
        assert (first.tokens, first.cost) == (tokens, 0 if free else money.cost(tokens, COST))
        assert first.their_tokens is None or 0 <= first.their_tokens <= 2**31
        assert [(row.provider, row.outcome, row.reason) for row in more] == [("b", "answered", "retry")] * moved

    def expect_rows(self, answers: Sequence[Reply], last: int, before: int, outcomes: set[str]) -> None:
        """Check many answers at once: vectors, charges, and a row for each attempt that their headers count.

        Args:
            answers: all of the same text.
            last: id of the last attempt before them.
            before: balance before them.
            outcomes: what provider a's attempts may have come to, besides an answer.
        """
        assert {got.status for got in answers} == {200}
        for got in answers:
            np.testing.assert_allclose(got.vectors, RIGHT[0][:1], atol=1e-6)
        assert before - self.balance() == PRICE * sum(got.json["usage"]["total_tokens"] for got in answers)
        rows = self.later_attempts(last)
        assert len(rows) == sum(int(got.headers["x-unmask-attempts"]) for got in answers)
        providers = Counter(row.provider for row in rows if row.outcome == "answered")
        assert providers == Counter(got.headers["x-unmask-provider"] for got in answers)
        lost = [row for row in rows if row.outcome != "answered"]
        assert {row.provider for row in lost} <= {"a"} and {row.outcome for row in lost} <= outcomes
        for row in rows:
            assert row.cost == (0 if row.outcome in FREE_OUTCOMES else cost_of(row)), row


RIGHT: list[np.ndarray] = []


@pytest.fixture(scope="module")
def all_books(encoder: Encoder, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Books]:
    lock, vectors = threading.Lock(), dict[tuple[str, str], np.ndarray]()

    def vectors_of(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            if new := [text for text in dict.fromkeys(texts) if (text, instruction) not in vectors]:
                rows = encoder.encode(new, instruction=instruction, normalize=True)
                vectors.update(((text, instruction), row) for text, row in zip(new, rows, strict=True))
            return np.stack([vectors[text, instruction] for text in texts])

    folder = tmp_path_factory.mktemp("faults")
    url, accounts, account, key = customer(folder, KeySettings())
    RIGHT[:] = [encoder.encode(TEXTS[:2], normalize=True)]
    (folder / "key").write_text(SECRET)
    (folder / "key").chmod(0o600)
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(folder, a.url, b.url)
        file.write_text(file.read_text().replace('data = "30d"', f'key_file = "{folder / "key"}"'))
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=SLOW, **options) as service:
            upstreams = Upstreams(a, b, service)
            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints), 60)
            yield Books(upstreams, accounts, account, key, options)
    accounts.close()


@pytest.fixture
def books(all_books: Books) -> Books:
    all_books.upstreams.reset()
    return all_books


@pytest.mark.parametrize("name", WIRE)
def test_faults_on_the_wire(
    books: Books, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fault, endpoint = WIRE[name], books.a
    if fault.outcome == "timeout":
        monkeypatch.setattr(attempts, "_MIN_ATTEMPT_S", 1.0)
    # A kept connection that breaks is asked twice.
    books.upstreams.a.script[:] = [to_callers(fault.behaviour, 2 if fault.outcome == "cut_off" else 1)]
    books.expect(fault.outcome)
    assert endpoint.breaker.state == fault.breaker and endpoint.admission == "admitted"
    if name in ("busy until a date", "busy for ever"):
        requests = len(books.upstreams.seen(books.upstreams.a))
        assert books.embed().headers["x-unmask-provider"] == "b"
        assert len(books.upstreams.seen(books.upstreams.a)) == requests
    if fault.checked:
        until(lambda: any(set(request.texts) - {*TEXTS} for request in books.upstreams.a.requests))
        assert endpoint.admission == "admitted"
    metrics = books.upstreams.service.call("GET", "/metrics", key=books.key).body.decode()
    assert SECRET not in caplog.text + metrics


def test_nobody_there_moves_the_request(books: Books) -> None:
    """Refused; no such host; a name and a literal that lead to this machine, for a provider outside this network."""
    port = books.upstreams.a.url.split(":")[-1]
    places: list[dict[str, Any]] = [{"url": "http://127.0.0.1:1/v1"}, {"url": "http://no-such-host.invalid/v1"}]
    places += [{"url": f"http://{host}:{port}", "private": False} for host in ("localhost", "0x7f.1")]
    places += [{"url": "http://[::ffff:169.254.169.254]/v1"}]
    for place in places:
        connections = books.upstreams.a.connections
        with ExitStack() as stack:
            books.connect_to(stack, **place)
            books.expect("unreachable")
        assert books.a.breaker.state == "closed" and books.upstreams.a.connections == connections
        books.a.breaker.close()  # five in a row would open it


def test_certificates_that_do_not_fit_move_the_request(books: Books, tmp_path: Path) -> None:
    for name, fields in {"self-signed": {}, "expired": {"days": -1}, "elsewhere": {"host": "127.0.0.2"}}.items():
        file, context = certificate(tmp_path, name, **fields)  # pyright: ignore[reportArgumentType]
        with fault_server_thread(books.upstreams.a.vectors_of, tls=context) as strange, ExitStack() as stack:
            trusted = {} if name == "self-signed" else {"ca_file": str(file)}
            books.connect_to(stack, url=strange.url, **trusted)
            books.expect("unreachable")
            assert not strange.requests


def test_a_kept_connection_that_was_closed_is_asked_again_over_a_new_one(books: Books) -> None:
    books.upstreams.a.script[:] = [right_then_close]
    for _ in range(3):
        books.expect("answered")
    assert books.a.breaker.state == "closed"


def test_a_storm_of_refusals_loses_traffic(books: Books) -> None:
    """A provider that refuses in two milliseconds looks fast, and must not win the traffic by it."""
    books.upstreams.a.script[:] = [busy(None)]
    before, last = books.balance(), books.last_attempt()
    answers = [books.embed(TEXTS[:1]) for _ in range(40)]
    assert {got.headers["x-unmask-provider"] for got in answers} == {"b"}
    assert len(books.upstreams.seen(books.upstreams.a)) < 12
    books.expect_rows(answers, last, before, {"busy"})
    assert books.a.breaker.state != "held" and books.a.admission == "admitted"


def test_a_provider_that_fails_half_of_the_time_is_out(books: Books) -> None:
    books.upstreams.a.script[:] = [reply({}, 500), right] * 30
    before, last, answers = books.balance(), books.last_attempt(), list[Reply]()
    while len(answers) < 30 and books.a.breaker.state == "closed":
        answers.append(books.embed(TEXTS[:1], provider={"order": ["a"]}))
    assert books.a.breaker.state == "open" and len(books.upstreams.seen(books.upstreams.a)) <= 12
    books.expect_rows(answers, last, before, {"failed"})
    assert books.a.admission == "admitted"


def test_one_canary_decides_about_recovery_under_load(books: Books) -> None:
    """While callers wait, an open breaker lets one check through at a time, and traffic starts slowly afterwards."""
    a, before, last = books.upstreams.a, books.balance(), books.last_attempt()
    a.script[:] = [reply({}, 503)]
    answers = [books.embed(TEXTS[:1], provider={"order": ["a"]}) for _ in range(5)]
    assert books.a.breaker.state == "open"
    a.requests.clear()
    a.script[:] = [after(0.5)]
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            answers.append(books.embed(TEXTS[:1]))

    with ThreadPoolExecutor(6) as callers:
        waits = [callers.submit(call) for _ in range(6)]
        until(lambda: bool(a.requests), 30)
        assert books.a.breaker.state == "half_open"
        until(lambda: books.a.breaker.state == "closed")
        assert not [texts for texts in books.upstreams.seen(a) if books.a.breaker.state == "half_open"]
        stop.set()
        for wait in waits:
            wait.result()
    books.expect_rows(answers, last, before, {"failed", "busy"})
    assert not set(a.requests[0].texts) & {*TEXTS}  # the canaries came first
    assert books.a.status(time.monotonic()) == "probation"


def test_with_all_down_nothing_is_charged(books: Books) -> None:
    before, last = books.balance(), books.last_attempt()
    for server in (books.upstreams.a, books.upstreams.b):
        server.script[:] = [reply({}, 503, {"retry-after": "7"})]
    got = books.embed()
    assert (got.status, got.error["code"]) == (503, "no_provider")
    assert 1 <= int(got.headers["retry-after"]) <= 7 and got.headers["x-should-retry"] == "true"
    assert books.balance() == before
    rows = books.later_attempts(last)
    assert {row.provider for row in rows} == {"a", "b"}
    assert {(row.charge, row.outcome) for row in rows} == {(None, "failed")}
    assert all(row.cost == cost_of(row) for row in rows)  # what they did before they failed may be on their bill
    assert [books.upstreams.endpoint(name).admission for name in ("a", "b")] == ["admitted"] * 2
    for server in (books.upstreams.a, books.upstreams.b):
        server.script[:] = [right]


def test_many_short_deadlines_blame_nobody(books: Books) -> None:
    """Callers who wait 50 ms get 504 and pay nothing, and the provider stays in traffic for the others."""
    books.upstreams.a.script[:] = [after(0.3)]
    before = books.balance()

    def impatient(number: int) -> int:
        return books.embed(TEXTS[:1], {"request-deadline-ms": "50"}, provider={"only": ["a"]}).status

    last = books.last_attempt()
    with ThreadPoolExecutor(8) as callers:
        statuses = list(callers.map(impatient, range(1000)))
    assert set(statuses) <= {429, 503, 504} and 504 in statuses  # others: no room, or hopeless by the estimate
    assert books.balance() == before
    late = books.later_attempts(last)
    assert {(row.provider, row.outcome, row.charge) for row in late} == {("a", "cancelled", None)}
    assert len(late) <= 1000 and all(row.cost == cost_of(row) for row in late)
    assert books.a.breaker.state == "closed" and books.a.admission == "admitted"
    books.upstreams.a.script[:] = [right]
    until(lambda: books.embed(provider={"only": ["a"]}).status == 200)


def test_a_provider_that_begins_to_recognise_canaries_is_out_at_its_next_check(books: Books) -> None:
    """It answers all published canaries rightly, and other texts by another model. Its next light run finds it."""
    references = books.upstreams.pool.models()[MODEL].references
    assert references is not None
    published = {canary.text for canary in references.canaries}
    a, honest = books.upstreams.a, books.upstreams.a.vectors_of

    def by_heart(texts: Sequence[str], instruction: str) -> np.ndarray:
        vectors = honest(texts, instruction)
        return np.stack([v if text in published else np.roll(v, 1) for v, text in zip(vectors, texts, strict=True)])

    a.vectors_of = by_heart
    before, last = books.balance(), books.last_attempt()
    try:
        books.check("a", light=True)
        until(lambda: books.a.admission == "quarantined")
        assert not {text for request in a.requests[:2] for text in request.texts} & published
        sentence = "a answers published canary texts rightly and other texts wrongly"
        until(lambda: books.a.finding == sentence)
        got = books.embed(TEXTS[:1], provider={"order": ["a"]})
        assert (got.headers["x-unmask-provider"], got.headers["x-unmask-attempts"]) == ("b", "1")
        books.expect_rows([got], last, before, set())
        probes = [row for row in books.later_attempts(last, probes=True) if row.provider == "a"]
        assert {(row.charge, row.outcome) for row in probes} == {(None, "answered")}
        assert all(row.cost == cost_of(row) for row in probes)
    finally:
        a.vectors_of = honest
    books.readmit("a")


def test_a_provider_that_becomes_slow_loses_its_traffic_until_it_recovers(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow answer is enough to leave, and it comes back once its average has decayed. The clock is ours here."""
    a, before, charged = books.upstreams.a, books.balance(), list[Reply]()

    def embed(**fields: Any) -> str:
        charged.append(books.embed(TEXTS[:1], **fields))
        assert charged[-1].status == 200 and charged[-1].headers["x-unmask-attempts"] == "1"
        return charged[-1].headers["x-unmask-provider"]

    def timed(name: str) -> float:
        started = time.monotonic()
        assert embed(provider={"only": [name]}) == name
        return time.monotonic() - started

    for name in ("a", "b"):  # minutes pass: slow answers of earlier tests have decayed
        books.upstreams.endpoint(name).load._rate._at -= 600
    usual = max(timed(name) for name in "abab")
    with monkeypatch.context() as scope:
        scope.setattr(load, "DECAY_S", 1e9)  # no time passes
        a.script[:] = [after(20 * usual)]
        timed("a")
        requests = len(books.upstreams.seen(a))
        assert [embed() for _ in range(20)] == ["b"] * 20 and len(books.upstreams.seen(a)) == requests
        a.script[:] = [right]
    books.a.load._rate._at -= 600  # minutes pass for it; b has answered meanwhile
    assert embed() == "a"
    tokens = sum(got.json["usage"]["total_tokens"] for got in charged)
    assert before - books.balance() == PRICE * tokens
    rows = [row for got in charged for row in books.attempts(got.headers["x-unmask-charge"])]
    assert len(rows) == len(charged) and {(row.outcome, row.reason) for row in rows} == {("answered", "answer")}
    assert all(row.cost == cost_of(row) > 0 for row in rows)
    assert books.a.breaker.state == "closed"


class Leaving(Coroutine[Any, Any, Any]):
    """Work whose task is cancelled while it waits for the n-th time."""

    def __init__(self, work: Coroutine[Any, Any, Any], waits: int) -> None:
        self.work, self.waits = work, waits

    def send(self, value: Any) -> Any:
        waiting_for = self.work.send(value)
        self.waits -= 1
        if not self.waits and (task := asyncio.current_task()) is not None:
            asyncio.get_running_loop().call_soon(task.cancel)
        return waiting_for

    def throw(self, *error: Any) -> Any:
        return self.work.throw(*error)

    def close(self) -> None:
        self.work.close()

    def __await__(self) -> Any:
        return self.work.__await__()


def test_a_caller_who_leaves_at_any_await_pays_for_a_settled_answer_alone(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is cancelled at its first wait, at its second and so on, until it ends before the caller leaves."""
    waits = [0]

    async def leave(work: Coroutine[Any, Any, Any], request: Request) -> Any:
        leaving = Leaving(work, waits[0])
        try:
            return await asyncio.ensure_future(leaving)
        except asyncio.CancelledError:
            raise ClientDisconnect from None
        finally:
            waits[0] = max(leaving.waits, 0)

    outcomes, number, left_early = set[str](), 0, True
    for number in range(1, 200):
        before, last = books.balance(), books.last_attempt()
        with monkeypatch.context() as scope:
            scope.setattr(embeddings, "cancel_on_disconnect", leave)
            waits[0] = number
            got = books.embed(TEXTS[:1], provider={"order": ["a"]})
        left_early = waits[0] == 0
        assert got.status == (500 if left_early else 200)  # it never leaves in truth, so uvicorn answers
        until(lambda: books.a.load.requests == 0)
        paid = before - books.balance()
        rows = books.later_attempts(last)
        settled = [row for row in rows if row.charge is not None]
        assert paid == PRICE * sum(row.tokens for row in settled) and {row.outcome for row in settled} <= {"answered"}
        assert bool(settled) or left_early
        assert len(rows) <= 1 and all(row.cost == cost_of(row) > 0 for row in rows)
        outcomes |= {row.outcome for row in rows}
        assert (books.a.breaker.state, books.a.admission) == ("closed", "admitted")
        if not left_early:
            break
    assert not left_early and number > 3 and outcomes == {"cancelled", "answered"}
    books.expect("answered")


def test_a_quarantine_moves_the_requests_of_another_process(books: Books, tiny_llama: Path) -> None:
    """One process finds the fault; an answer that the other one is waiting for is thrown away, and paid for by us."""
    a, released = books.upstreams.a, threading.Event()
    honest = a.vectors_of

    async def slow(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        if set(request.texts) <= {*TEXTS}:
            await asyncio.to_thread(released.wait, 60)
        return await right(server, request, writer)

    url = books.options["accounts_url"]
    accounts = Accounts(url, pepper=Path(url.removeprefix("sqlite:///")).parent / "pepper")
    with running(tiny_llama, accounts, intervals=SLOW, **books.options) as service, ThreadPoolExecutor(1) as caller:
        other = Upstreams(a, books.upstreams.b, service)
        until(lambda: all(one.admission == "admitted" for one in other.pool.models()[MODEL].endpoints))
        before = books.balance()
        a.requests.clear()
        a.script[:] = [slow]
        body = {"model": MODEL, "input": TEXTS[:2], "provider": {"order": ["a"]}}
        waiting = caller.submit(service.call, "POST", "/v1/embeddings", body, None, books.key)
        until(lambda: bool(other.seen(a)))
        a.vectors_of = lambda texts, instruction: np.roll(honest(texts, instruction), 3, axis=1)
        try:
            books.check("a", light=True)
            until(lambda: other.endpoint("a").admission == "quarantined")
            assert books.a.admission == "quarantined"
            released.set()
            got = waiting.result()
        finally:
            released.set()
            a.vectors_of = honest
        assert (got.status, got.headers["x-unmask-provider"], got.headers["x-unmask-attempts"]) == (200, "b", "2")
        np.testing.assert_allclose(got.vectors, RIGHT[0], atol=1e-6)
        tokens = got.json["usage"]["total_tokens"]
        assert before - books.balance() == PRICE * tokens
        rows = books.attempts(got.headers["x-unmask-charge"])
        outcomes = [(row.provider, row.outcome, row.reason) for row in rows]
        assert outcomes == [("a", "discarded", "answer"), ("b", "answered", "retry")]
        assert all(row.cost == cost_of(row) > 0 for row in rows)
        assert other.endpoint("a").breaker.state == "closed"
        a.script[:] = [right]
        books.readmit("a")
        until(lambda: other.endpoint("a").admission == "admitted")
    accounts.close()


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_jumps_changes_no_answer_and_no_charge(
    books: Books, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The wall clock only dates rows: deadlines, breakers and averages go by the monotonic one."""
    a, real = books.upstreams.a, time.time_ns
    books.expect("answered")
    with monkeypatch.context() as scope:
        scope.setattr(time, "time_ns", lambda: real() + hours * 3600 * 10**9)
        scope.setattr(time, "time", lambda: real() / 1e9 + hours * 3600)
        for module in (endpoint_module, daily_cost):
            scope.setattr(module, "today", lambda: (datetime.now(UTC) + timedelta(hours=hours)).date())
        last = books.last_attempt()
        books.expect("answered")
        a.script[:] = [to_callers(reply({}, 500), 1)]
        books.expect("failed")
        dates = {round((row.at - real() / 1e6) / 3.6e6) for row in books.later_attempts(last)}
        assert dates == {hours}
        assert books.a.daily_cost.total(endpoint_module.today()) > 0
    books.upstreams.reset()
    books.expect("answered")
    assert books.a.breaker.state == "closed"


def test_every_mistake_of_the_bank_is_named_and_costs_no_caller(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    references, honest = books.upstreams.pool.models()[MODEL].references, books.upstreams.b.vectors_of
    monkeypatch.setattr(books.upstreams.pool, "report", lambda verdict: 0)  # this process alone, see fault 26
    assert references is not None and len(references.bank) >= 15
    for mistake in references.bank:
        canaries = [(canary.text, canary.instruction) for canary in references.canaries]
        vectors = dict(zip(canaries, mistake.vectors, strict=True))

        def mistaken(texts: Sequence[str], instruction: str, vectors: Any = vectors) -> np.ndarray:
            rows = honest(texts, instruction)
            return np.stack([vectors.get((text, instruction), row) for text, row in zip(texts, rows, strict=True)])

        assert books.expect_quarantine(mistaken) == mistake.fault
        books.upstreams.reset()


def test_noise_batch_and_state_are_named_and_cost_no_caller(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, draw, long_texts = books.upstreams.b.vectors_of, np.random.default_rng(1), list[str]()
    monkeypatch.setattr(books.upstreams.pool, "report", lambda verdict: 0)  # this process alone, see fault 26

    def noisy(texts: Sequence[str], instruction: str) -> np.ndarray:
        rows = honest(texts, instruction)
        return rows + draw.normal(size=rows.shape).astype(np.float32) * 4e-3

    def neighbourly(texts: Sequence[str], instruction: str) -> np.ndarray:
        rows = honest(texts, instruction)
        mixed = max(map(len, texts)) > 200 and min(map(len, texts)) < 100 and len(texts) < 20
        return rows + 0.2 * rows.mean(0) if mixed else rows

    def stateful(texts: Sequence[str], instruction: str) -> np.ndarray:
        long_texts.extend(text for text in texts if len(text) > 1000)
        return honest(texts, instruction) + 0.05 * (len({*long_texts}) < len(long_texts))

    batch = "gives a text another vector depending on its neighbours or on what came before"
    noise = "gives another vector each time it is asked for the same text"
    for vectors_of, sentence in ((noisy, noise), (neighbourly, batch), (stateful, batch)):
        assert books.expect_quarantine(vectors_of).startswith(sentence)
        books.upstreams.reset()
