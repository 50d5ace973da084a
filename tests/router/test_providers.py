"""Serving through providers: real HTTP on both sides, providers that fail as scripted, and right vectors only."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection

from tests.api.live import LocalService, Reply, running, until
from tests.router.fault_server import (
    Behaviour,
    FaultServer,
    SeenRequest,
    after,
    changed,
    envelope,
    fault_server_thread,
    reply,
    reset,
    right,
    silent,
)
from unmask.accounts import Accounts, costs, keys, ledger, money, people, tariff
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.keys import KeySettings
from unmask.accounts.taint import TaintedWindow, tainted_requests, tainted_windows
from unmask.accounts.verification import verify
from unmask.catalogue.store import open_database
from unmask.encoder import Encoder
from unmask.errors import UsageError
from unmask.router import breaker, public_names
from unmask.router.daily_cost import today
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.hedging import MIN_SAMPLES
from unmask.router.origins import Origins
from unmask.router.pool import ProviderPool
from unmask.router.verdicts import Verdict, order_admission
from unmask.router.watch_intervals import WatchIntervals
from unmask.storage.database import now_ms
from unmask.storage.schema import charges, provider_attempts
from unmask.web import website

FAST = WatchIntervals(busy=0.3, idle=0.3, second=0.05, full=3600.0, retry=0.1)
SLOW = WatchIntervals(busy=600.0, second=0.05, retry=0.1)  # no regular check comes in the way of a script
RUN_BEGAN = int(time.time())
MODEL = "tiny_llama"
TEXTS = ["a ferry leaves", "bread rises", "the clock is repaired", "rain washed the path", "interest is paid"]


class Upstreams:
    """Two scripted providers and the server before them.

    Attributes:
        a: of the kind openai, takes four texts at a time.
        b: of the kind unmask.
        service: the server, which never loads the model itself.
    """

    def __init__(self, a: FaultServer, b: FaultServer, service: LocalService) -> None:
        self.a, self.b, self.service = a, b, service
        self.tasks: list[asyncio.Future[None]] = []  # the loop alone would not keep them

    @property
    def pool(self) -> ProviderPool:
        assert self.service.models.providers is not None
        return self.service.models.providers

    @property
    def last_number(self) -> int:
        """Number of the last verdict that the server knows."""
        return max((verdict.number for verdict in self.pool._verdicts.values()), default=0)

    def endpoint(self, name: str) -> ProviderEndpoint:
        return next(one for one in self.pool.models()[MODEL].endpoints if one.provider.name == name)

    def embed(self, texts: Any = "a ferry leaves", headers: dict[str, str] | None = None, **fields: Any) -> Reply:
        return self.service.call("POST", "/v1/embeddings", {"model": MODEL, "input": texts} | fields, headers)

    def take_verdicts(self, findings: dict[tuple[str, str], str]) -> None:
        """Quarantine with a finding, or admit again with an empty one, as the operator does."""
        verdicts = {
            (provider, model): Verdict(
                provider=provider,
                model=model,
                verdict="quarantined" if finding else "admitted",
                finding=finding,
                actor="command line",
                number=self.last_number + 1,
            )
            for (provider, model), finding in findings.items()
        }
        self.in_loop(self.pool.take_verdicts, verdicts)

    def order_quarantine(self, name: str, fault: str) -> None:
        """Quarantine a provider as this process's own canaries do."""
        work = self.pool._quarantine
        self.in_loop(lambda: self.tasks.append(asyncio.ensure_future(work(self.endpoint(name), fault))))

    def in_loop(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the server's event loop, as its signal handler and its sync do."""
        next(iter(self.pool._watches)).get_loop().call_soon_threadsafe(call, *arguments)

    def seen(self, server: FaultServer) -> list[list[str]]:
        """The requests that the server has had and that were no canaries."""
        return [request.texts for request in server.requests if set(request.texts) <= {*TEXTS}]

    def await_runs(self, name: str) -> ProviderEndpoint:
        """Wait until no run of canaries is due or under way at a provider. Returns its endpoint."""
        endpoint = self.endpoint(name)
        until(lambda: not endpoint.full_due)
        endpoint.run_at = 0.0  # set anew after each run
        self.in_loop(endpoint.wake.set)
        until(lambda: endpoint.run_at != 0.0)
        return endpoint

    def reset(self) -> None:
        for server in (self.a, self.b):
            server.script[:] = [right]
        until(lambda: all(not endpoint.full_due for endpoint in self.pool.models()[MODEL].endpoints))
        if any(endpoint.admission == "quarantined" for endpoint in self.pool.models()[MODEL].endpoints):
            self.take_verdicts({("a", MODEL): "", ("b", MODEL): ""})
        until(lambda: all(endpoint.admission == "admitted" for endpoint in self.pool.models()[MODEL].endpoints))
        for endpoint in self.pool.models()[MODEL].endpoints:
            endpoint.breaker.close()
            endpoint._avoid_until = 0.0
            endpoint.full_due = False
        for server in (self.a, self.b):
            server.requests.clear()


def providers_file(folder: Path, a: str, b: str, *, remote_only: bool = True) -> Path:
    file = folder / "providers.toml"
    file.write_text(
        (f'remote_only = ["{MODEL}"]\n' if remote_only else "")
        + f'[[provider]]\nname = "a"\nkind = "openai"\nurl = "{a}"\nprivate = true\ndata = "30d"\n'
        f'[[provider.model]]\nid = "{MODEL}"\ncost = "0.004"\nmax_inputs = 4\n'
        f'[[provider]]\nname = "b"\nkind = "unmask"\nurl = "{b}"\nprivate = true\n'
        f'[[provider.model]]\nid = "{MODEL}"\ncost = "0.004"\n'
    )
    return file


@pytest.fixture(scope="module")
def vectors_of(encoder: Encoder):
    lock = threading.Lock()

    def embed(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    return embed


@pytest.fixture(scope="module")
def both(vectors_of, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path_factory.mktemp("providers"), a.url, b.url)
        with running(tiny_llama, build_pages=website, providers_file=file, intervals=SLOW, warm=()) as service:
            yield Upstreams(a, b, service)


@pytest.fixture
def upstreams(both: Upstreams) -> Upstreams:
    both.reset()
    return both


def test_a_model_without_an_engine_is_answered_by_providers(upstreams: Upstreams, encoder: Encoder) -> None:
    got = upstreams.embed(TEXTS)
    assert got.status == 200, got.body
    np.testing.assert_allclose(got.vectors, encoder.encode(TEXTS, normalize=True), atol=1e-6)
    assert got.json["usage"]["prompt_tokens"] == encoder.count_tokens(TEXTS).sum()
    assert got.headers["x-unmask-provider"] in ("a", "b") and got.headers["x-unmask-attempts"] == "1"
    assert got.headers["x-unmask-vector-space"].startswith("vs_")
    precision, worst, checked = got.headers["x-unmask-conformance"].split(";")
    assert precision == "exact" and float(worst.removeprefix("worst=")) < 1e-9
    assert RUN_BEGAN <= int(checked.removeprefix("checked=")) <= time.time()
    served = upstreams.service.models.list()[0]
    assert served.state == "remote"
    assert upstreams.service.call("GET", "/ready").json["models"] == {MODEL: "ok"}


def test_a_check_is_never_dated_later_than_it_was(upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in upstreams.pool.models()[MODEL].endpoints:
        monkeypatch.setattr(endpoint, "passed_at", 1_700_000_000.9)
    assert upstreams.embed().headers["x-unmask-conformance"].endswith(";checked=1700000000")
    listed = upstreams.service.call("GET", f"/v1/models/{MODEL}/endpoints").json["data"]
    assert [one["conformance"]["checked"] for one in listed if one["kind"] != "local"] == [1_700_000_000] * 2


def test_callers_choose_in_openrouters_words(upstreams: Upstreams) -> None:
    for wish, answers in (
        ({"only": ["a"]}, "a"), ({"ignore": ["a"]}, "b"), ({"order": ["b", "a"]}, "b"), ({"order": ["a"]}, "a"),
        ({"data_collection": "deny"}, "b"),
    ):  # fmt: skip
        for _ in range(3):
            assert upstreams.embed(provider=wish).headers["x-unmask-provider"] == answers
    assert upstreams.embed(provider={"only": ["c", "b"]}).headers["x-unmask-provider"] == "b"
    for harmless in ({"ignore": ["c"]}, {"order": ["c"]}):
        assert upstreams.embed(provider=harmless).status == 200
    assert upstreams.embed(provider={"onyl": ["a"]}).headers["x-unmask-ignored-fields"] == "provider.onyl"
    for body in ({"provider": {"sort": "beauty"}}, {"provider": {"only": "a"}}, {"provider": "a"}):
        assert upstreams.embed(**body).error["param"] == "provider"  # pyright: ignore[reportArgumentType]
    message = upstreams.embed(provider={"sort": "beauty"}).error["message"]
    assert "'beauty', expected 'latency', 'price' or 'throughput' - at `$.sort`" in message
    other = upstreams.embed(models=["another/model"])
    assert other.status == 400 and "cannot be mixed" in other.error["message"]


def test_a_request_is_split_to_the_providers_limit_and_keeps_its_order(upstreams: Upstreams, encoder: Encoder) -> None:
    texts = TEXTS * 2
    got = upstreams.embed(texts, provider={"only": ["a"]})
    np.testing.assert_allclose(got.vectors, encoder.encode(texts, normalize=True), atol=1e-6)
    assert sorted(map(len, upstreams.seen(upstreams.a))) == [2, 4, 4]


def test_an_instruction_goes_to_those_who_take_one(upstreams: Upstreams, encoder: Encoder) -> None:
    got = upstreams.embed(instruction="Find the boat:")
    assert got.headers["x-unmask-provider"] == "b"
    expected = encoder.encode("a ferry leaves", instruction="Find the boat:", normalize=True)
    np.testing.assert_allclose(got.vectors, expected, atol=1e-6)
    upstreams.b.script[:] = [silent]
    got = upstreams.embed(instruction="Find the boat:", headers={"request-deadline-ms": "300"})
    assert got.status == 504


FAILURES: dict[str, Behaviour] = {
    "busy": reply({}, 429, {"retry-after": "1"}),
    "error": reply({}, 500),
    "unavailable": reply({}, 503),
    "key": reply({}, 401),
    "limits": reply({}, 422),
    "HTML": reply(b"<html>", 502, {"content-type": "text/html"}),
    "broken": reset(b"HTTP/1.1 200 OK\r\n"),
    "too few": changed(lambda answer: answer["data"].clear()),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_moves_the_request(upstreams: Upstreams, encoder: Encoder, name: str) -> None:
    upstreams.a.script[:] = [FAILURES[name]]
    got = upstreams.embed(TEXTS[:3], provider={"order": ["a"]})
    assert got.status == 200, got.body
    assert (got.headers["x-unmask-provider"], got.headers["x-unmask-attempts"]) == ("b", "2")
    np.testing.assert_allclose(got.vectors, encoder.encode(TEXTS[:3], normalize=True), atol=1e-6)
    assert len(upstreams.seen(upstreams.b)) == 1
    held = upstreams.endpoint("a").breaker.state == "held"
    assert held == (name == "key")


def test_a_part_that_fails_moves_the_whole_request(upstreams: Upstreams, encoder: Encoder) -> None:
    upstreams.a.script[:] = [right, reply({}, 500), right]
    got = upstreams.embed(TEXTS * 2, provider={"order": ["a"]})
    assert got.headers["x-unmask-provider"] == "b" and [len(texts) for texts in upstreams.seen(upstreams.b)] == [10]
    np.testing.assert_allclose(got.vectors, encoder.encode(TEXTS * 2, normalize=True), atol=1e-6)


def test_five_failures_open_the_breaker_and_a_right_canary_closes_it(upstreams: Upstreams) -> None:
    upstreams.a.script[:] = [reply({}, 500)]
    for _ in range(5):
        assert upstreams.embed(provider={"order": ["a"]}).headers["x-unmask-provider"] == "b"
    assert upstreams.endpoint("a").breaker.state == "open"
    before = len(upstreams.a.requests)
    assert upstreams.embed(provider={"order": ["a"]}).headers["x-unmask-attempts"] == "1"
    assert len(upstreams.a.requests) == before
    upstreams.a.script[:] = [right]
    until(lambda: upstreams.endpoint("a").breaker.state == "closed")
    assert upstreams.endpoint("a").status(time.monotonic()) == "probation"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_one_refusal_takes_a_healthy_provider_out_for_seconds(upstreams: Upstreams, status: int) -> None:
    """A request was refused by mistake, and canaries are answered. Callers learn when to come back."""
    endpoint = upstreams.endpoint("a")
    upstreams.a.script[:] = [reply({}, status), right]
    refused = upstreams.embed(provider={"only": ["a"]})
    assert (refused.status, endpoint.breaker.state) == (503, "held")
    assert 1 <= int(refused.headers["retry-after"]) <= breaker.FIRST_S
    assert endpoint.available_in(time.monotonic()) <= breaker.FIRST_S
    until(lambda: endpoint.breaker.state == "closed")
    assert upstreams.embed(provider={"only": ["a"]}).status == 200


def test_the_callers_own_deadline_is_nobodys_fault(upstreams: Upstreams) -> None:
    upstreams.a.script[:] = [silent]
    for _ in range(8):
        got = upstreams.embed(headers={"request-deadline-ms": "60"}, provider={"only": ["a"]})
        assert (got.status, got.error["code"]) == (504, "deadline_exceeded")
    assert upstreams.endpoint("a").breaker.state == "closed"


def test_when_all_fail_the_answer_says_when_to_come_back(upstreams: Upstreams) -> None:
    for server in (upstreams.a, upstreams.b):
        server.script[:] = [reply({"error": {"message": "the key is sk-secret-12345678"}}, 503)]
    got = upstreams.embed()
    assert (got.status, got.error["code"]) == (503, "no_provider") and "sk-secret" not in got.body.decode()
    assert 1 <= int(got.headers["retry-after"]) <= 60 and got.headers["x-should-retry"] == "true"


def test_a_name_that_no_provider_has_is_the_callers_mistake(
    upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_for(name: str) -> tuple[str | None, str | None, str]:
        error = upstreams.embed(provider={"only": [name]}).error
        return error["param"], error["code"], error["message"]

    names = ", ".join(["local", *(provider.name for provider in upstreams.pool.settings.providers)])
    message = f"provider.only=nobody: this server has no provider of this name: it has {names}."
    assert ask_for("nobody") == ("provider.only", None, f"{message} See /v1/models/{{id}}/endpoints.")
    # One that the file had a moment ago is none: another process may have it still.
    file, good = upstreams.pool.file, upstreams.pool.file.read_text()
    file.write_text(good.replace('name = "b"', 'name = "c"'))
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: "c" in upstreams.pool.public_names.for_callers)
    assert ask_for("b")[1] == "no_provider"
    with monkeypatch.context() as patch:
        patch.setattr(public_names, "_FORMER_NAME_S", 0.0)
        assert ask_for("b")[0] == "provider.only"
    file.write_text(good)
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: "b" in upstreams.pool.public_names.for_callers)


def test_what_no_provider_can_do_is_refused(upstreams: Upstreams) -> None:
    assert upstreams.embed(normalize=False).error["code"] == "no_conforming_provider"
    assert upstreams.embed([[1, 2, 3]], token_encoding="native").error["code"] == "no_conforming_provider"
    too_long = upstreams.embed("word " * 600)
    assert too_long.status == 400 and "maximum context length" in too_long.error["message"]


def test_a_file_that_is_wrong_changes_nothing(upstreams: Upstreams) -> None:
    file, good = upstreams.pool.file, upstreams.pool.file.read_text()
    endpoints = upstreams.pool.models()[MODEL].endpoints
    file.write_text(good.replace("private = true", "private = maybe"))
    with pytest.raises(UsageError, match=r"providers.toml cannot be read"):
        upstreams.pool.reload()
    file.write_text(good)
    assert upstreams.pool.models()[MODEL].endpoints == endpoints and upstreams.embed().status == 200


def test_connections_from_before_two_reloads_are_closed_after_their_requests(upstreams: Upstreams) -> None:
    sessions = [client._session for client in upstreams.pool._clients]
    assert all(sessions)
    go_on = threading.Event()

    async def right_later(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        await asyncio.to_thread(go_on.wait, 30)
        return await right(server, request, writer)

    upstreams.a.script[:] = upstreams.b.script[:] = [right_later]
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(upstreams.embed)
        until(lambda: bool(upstreams.a.requests or upstreams.b.requests))
        for _ in range(2):
            upstreams.in_loop(upstreams.pool.reload)
        go_on.set()
        assert request.result().status == 200
    until(lambda: all(session is not None and session.closed for session in sessions))


def test_a_file_that_is_read_again_keeps_what_is_known(upstreams: Upstreams) -> None:
    file, good = upstreams.pool.file, upstreams.pool.file.read_text()
    before = upstreams.endpoint("a")
    file.write_text(good.replace("max_inputs = 4", "max_inputs = 2"))
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: upstreams.endpoint("a") is not before)
    assert upstreams.endpoint("a").admission == "admitted" and upstreams.endpoint("a").load is before.load
    upstreams.a.requests.clear()
    assert upstreams.embed(TEXTS, provider={"only": ["a"]}).status == 200
    assert sorted(map(len, upstreams.seen(upstreams.a))) == [1, 2, 2]
    file.write_text(good.replace('kind = "openai"', 'kind = "unmask"'))
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: upstreams.endpoint("a").provider.kind == "unmask")
    assert upstreams.endpoint("a").load is not before.load  # another server, as far as anybody knows
    file.write_text(good)
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: upstreams.endpoint("a").provider.kind == "openai")


def test_a_cold_model_is_answered_by_a_provider_while_it_loads(
    vectors_of, tiny_llama: Path, encoder: Encoder, tmp_path: Path
) -> None:
    with fault_server_thread(vectors_of) as a:
        file = providers_file(tmp_path, a.url, "http://127.0.0.1:1/v1", remote_only=False)
        with running(tiny_llama, providers_file=file, intervals=SLOW, warm=()) as service:
            assert service.models.providers is not None
            until(lambda: service.models.providers.models()[MODEL].any_admitted())  # pyright: ignore[reportOptionalMemberAccess]
            assert service.models.list()[0].state == "cold"
            cold = service.embed("a ferry leaves")
            assert (cold.status, cold.headers["x-unmask-provider"]) == (200, "a")
            until(lambda: service.models.list()[0].state == "ready")
            own = service.embed("a ferry leaves", provider={"only": ["local"]})
            assert own.headers["x-unmask-provider"] == "local"
            np.testing.assert_allclose(cold.vectors, own.vectors, atol=1e-6)
            assert cold.headers["x-unmask-vector-space"] == own.headers["x-unmask-vector-space"]
            listed = service.call("GET", f"/v1/models/{MODEL}").json
            assert listed["vector_space"] == own.headers["x-unmask-vector-space"]


def customer(folder: Path, settings: KeySettings) -> tuple[str, Accounts, str, str]:
    """Open an account with a dollar of credit and price the model: database, accounts, account's id, key."""
    url = f"sqlite:///{folder / 'accounts.sqlite'}"
    accounts = Accounts(url, pepper=folder / "pepper")
    with accounts.database.begin() as connection:
        account = people.open_account(connection, "customer", now_ms())
        ledger.top_up(connection, account, 1_000_000_000, "payment", now_ms())
        tariff.set_price(connection, tariff.TariffPrice(MODEL, "default", 8_000_000), now_ms())
        key = keys.create(connection, accounts.peppers, account, settings, now_ms())
    return url, accounts, account, key


def test_a_provider_that_drifts_under_load_is_out_after_two_light_runs(
    vectors_of, tiny_llama: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """No wrong vector reaches a caller after the first wrong canary, and all before it are in the taint report."""
    url, accounts, _, key = customer(tmp_path, KeySettings(scopes=("embeddings", "account")))
    drifted = threading.Event()

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        vectors = vectors_of(texts, instruction)
        return np.roll(vectors, 3, axis=1) if drifted.is_set() else vectors

    expected = encoder.encode("a ferry leaves", normalize=True)
    with fault_server_thread(drifting) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path, a.url, b.url)
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=FAST, **options) as service:
            upstreams = Upstreams(a, b, service)

            def embed() -> Reply:
                return service.call("POST", "/v1/embeddings", {"model": MODEL, "input": "a ferry leaves"}, key=key)

            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints))
            stop = threading.Event()

            def call() -> list[tuple[float, bool, str, str]]:
                answers = []
                while not stop.is_set():
                    sent = time.monotonic()
                    got = embed()
                    if got.status == 200:
                        is_right = bool(np.abs(got.vectors - expected).max() < 1e-5)
                        names = got.headers["x-unmask-provider"], got.headers["x-unmask-charge"]
                        answers.append((sent, is_right, *names))
                return answers

            with ThreadPoolExecutor(4) as callers:
                running_calls = [callers.submit(call) for _ in range(4)]
                until(lambda: len(a.requests) > 60)
                drifted.set()
                until(lambda: upstreams.endpoint("a").admission != "admitted")
                suspended = time.monotonic()
                until(lambda: upstreams.endpoint("a").admission == "quarantined")
                before = len(b.requests)
                until(lambda: len(b.requests) > before + 40)  # well after the last answer that was on its way
                stop.set()
                answers = [one for future in running_calls for one in future.result()]
            # Judged by when a request was sent: an answer may lie unread for any time on a busy machine.
            sent_after = [(is_right, name) for sent, is_right, name, _ in answers if sent > suspended]
            assert set(sent_after) == {(True, "b")}
            until(lambda: "full run" not in upstreams.endpoint("a").finding)

            def windows() -> list[TaintedWindow]:
                with accounts.database.read() as connection:
                    return tainted_windows(connection)

            until(lambda: [one.finding for one in windows()] == [upstreams.endpoint("a").finding])
            with accounts.database.read() as connection:
                tainted = {charge for charge, _, _, _ in tainted_requests(connection, windows()[0])}
            assert {charge for _, is_right, _, charge in answers if not is_right} <= tainted
            assert tainted <= {charge for _, _, name, charge in answers if name == "a"}
            lines = service.call("GET", "/v1/usage", key=key).json["tainted"]
            # A canary may notice the drift before any answer goes out, on a machine that is busy.
            expected_lines = [("a", MODEL, len(tainted))] if tainted else []
            assert [(line["provider"], line["model"], line["requests"]) for line in lines] == expected_lines
            sentence = "a rotates or mirrors the space: only inner products are right"
            assert upstreams.endpoint("a").finding == sentence
            b.script[:] = [changed(lambda answer: answer["data"].reverse()), right]
            upstreams.take_verdicts({("b", MODEL): "b was taken out by the operator"})
            until(lambda: upstreams.endpoint("b").admission == "quarantined")
            nobody = embed()
            assert (nobody.status, nobody.error["code"]) == (503, "no_conforming_provider")
            assert nobody.headers["retry-after"] == "120" and nobody.headers["x-should-retry"] == "true"
            assert service.call("GET", "/ready").status == 503
            drifted.clear()
            a.script[:] = [right]
            with accounts.database.begin() as connection:  # as on the command line, so that the server reads it
                order_admission(connection, COMMAND_LINE, "a", MODEL)
            until(lambda: embed().status == 200)
    accounts.close()


def test_an_idle_provider_is_checked_soon_after_its_traffic_begins(
    vectors_of, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its next check was an hour away while nobody used it, and stays there for the one that nobody uses."""
    intervals = WatchIntervals(busy=0.3, idle=3600.0, second=0.05)
    drifted = threading.Event()

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        vectors = vectors_of(texts, instruction)
        return np.roll(vectors, 3, axis=1) if drifted.is_set() else vectors

    with fault_server_thread(drifting) as a, fault_server_thread(drifting) as b:
        file = providers_file(tmp_path, a.url, b.url)
        with running(tiny_llama, providers_file=file, intervals=intervals, warm=()) as service:
            upstreams = Upstreams(a, b, service)
            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints))
            # Both are idle: the next check is far away.
            until(lambda: all(e.run_at > time.monotonic() + 60 for e in upstreams.pool.models()[MODEL].endpoints))
            requests = len(b.requests)
            drifted.set()
            assert upstreams.embed(provider={"only": ["a"]}).status == 200
            until(lambda: upstreams.endpoint("a").admission == "quarantined")
            assert len(b.requests) == requests and upstreams.endpoint("b").admission == "admitted"


def test_a_quarantine_in_the_middle_of_a_full_run_stays(upstreams: Upstreams) -> None:
    """The run passes, but the operator has decided meanwhile."""
    endpoint = upstreams.endpoint("a")
    upstreams.a.script[:] = [after(0.2)]

    def check() -> None:
        endpoint.full_due = True
        endpoint.wake.set()

    upstreams.in_loop(check)
    until(lambda: len(upstreams.a.requests) > 2)
    upstreams.take_verdicts({("a", MODEL): "a was taken out by the operator"})
    until(lambda: endpoint.admission == "quarantined")
    upstreams.a.script[:] = [right]
    seen = len(upstreams.a.requests)
    until(lambda: len(upstreams.a.requests) > seen)
    upstreams.in_loop(endpoint.wake.set)  # the watch comes round to it once the run has ended
    until(lambda: not endpoint.wake.is_set())
    assert endpoint.admission == "quarantined" and endpoint.finding == "a was taken out by the operator"


def test_an_answer_is_withheld_if_its_provider_falls_while_the_charge_is_booked(
    vectors_of, tiny_llama: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, accounts, account, key = customer(tmp_path, KeySettings())
    settle, falls = accounts.settle, list[ProviderEndpoint]()

    async def settle_slowly(*arguments: Any) -> None:
        await settle(*arguments)
        for endpoint in falls:
            endpoint.quarantine("fell")

    monkeypatch.setattr(accounts, "settle", settle_slowly)
    expected = encoder.encode("a ferry leaves", normalize=True)
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path, a.url, b.url)
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=SLOW, **options) as service:
            upstreams = Upstreams(a, b, service)
            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints))

            def embed(**fields: Any) -> Reply:
                body = {"model": MODEL, "input": "a ferry leaves"} | fields
                return service.call("POST", "/v1/embeddings", body, key=key)

            def balance() -> int:
                with accounts.database.read() as connection:
                    assert verify(connection).drift == ()
                    return people.account(connection, account).balance

            falls[:] = [upstreams.endpoint("a")]
            moved = embed(provider={"order": ["a"]})
            assert (moved.status, moved.headers["x-unmask-provider"]) == (200, "b")
            np.testing.assert_allclose(moved.vectors, expected, atol=1e-6)
            cost = 8 * moved.json["usage"]["total_tokens"]
            assert balance() == 1_000_000_000 - cost
            falls[:] = [upstreams.endpoint("b")]
            withheld = embed()
            assert (withheld.status, withheld.error["code"]) == (503, "no_conforming_provider")
            until(lambda: balance() == 1_000_000_000 - cost)  # charged, and given back
            with accounts.database.read() as connection:
                rows = connection.execute(sa.select(provider_attempts).where(provider_attempts.c.reason != "probe"))
                booked = [(row.provider, row.outcome, row.charge is not None) for row in rows]
                providers = connection.scalars(sa.select(charges.c.provider).where(charges.c.provider.is_not(None)))
                assert sorted(providers) == ["b", "b"]
            # The charge of the withheld answer keeps its attempt: it was settled, and refunded.
            assert sorted(booked) == [("a", "discarded", True), ("b", "answered", True), ("b", "answered", True)]
    accounts.close()


def test_endpoints_say_who_answers_and_how_well(upstreams: Upstreams) -> None:
    for _ in range(3):
        assert upstreams.embed(TEXTS).status == 200
    listed = upstreams.service.call("GET", f"/v1/models/{MODEL}/endpoints").json
    assert listed["model"] == MODEL
    a, b = listed["data"]
    assert (a["name"], a["kind"], a["data"], a["max_inputs"]) == ("a", "openai", "30d", 4)
    assert (b["name"], b["kind"], b["data"], b["max_inputs"]) == ("b", "unmask", "none", 2048)
    for endpoint in (a, b):
        assert endpoint["status"] in ("admitted", "probation") and endpoint["precision"] == "exact"
        assert endpoint["conformance"]["worst"] < 1e-9 and endpoint["conformance"]["finding"] == ""
        assert endpoint["uptime_last_1d"] is None  # fewer than 100 requests
    latency = next(one["latency_last_30m"] for one in (a, b) if one["latency_last_30m"])
    assert 0 < latency["p50"] <= latency["p99"]
    assert listed["vector_space"] == upstreams.embed().headers["x-unmask-vector-space"]
    assert upstreams.service.call("GET", "/v1/models/no/such/endpoints").status == 404
    text = upstreams.service.call("GET", "/metrics").body.decode()
    for name in ("a", "b"):
        assert f'unmask_provider_admitted{{model="{MODEL}",provider="{name}"}} 1.0' in text
    assert upstreams.service.metric("unmask_provider_attempts_total{") >= 3


def test_counters_of_providers_only_rise_and_follow_prometheus_rules(upstreams: Upstreams) -> None:
    def read() -> dict[str, float]:
        text = upstreams.service.call("GET", "/metrics").body.decode()
        families = list(text_string_to_metric_families(text))  # raises an error for what Prometheus would not read
        kinds = {family.name: family.type for family in families}
        assert kinds["unmask_provider_attempts"] == kinds["unmask_retries"] == kinds["unmask_hedges"] == "counter"
        assert kinds["unmask_provider_attempt_seconds"] == "histogram"
        samples = [sample for family in families for sample in family.samples]
        return {
            f"{sample.name} {' '.join(value for _, value in sorted(sample.labels.items()))}": sample.value
            for sample in samples
        }

    before = read()
    upstreams.a.script[:] = [reply({}, 500)]
    answered = upstreams.embed(provider={"order": ["a"]})
    assert answered.headers["x-unmask-provider"] == "b"
    assert upstreams.embed(provider={"only": ["a"]}).status == 503
    after_requests = read()
    tokens = answered.json["usage"]["total_tokens"]

    def rise(name: str, *labels: str) -> float:
        key = " ".join([name, *labels])
        return after_requests[key] - before.get(key, 0.0)

    assert rise("unmask_provider_attempts_total", MODEL, "failed", "a", "answer") == 2
    assert rise("unmask_provider_attempts_total", MODEL, "answered", "b", "retry") == 1
    assert rise("unmask_provider_attempt_seconds_count", MODEL, "failed", "a") == 2
    assert rise("unmask_provider_attempt_seconds_bucket", "+Inf", MODEL, "answered", "b") == 1
    assert rise("unmask_provider_tokens_total", "ours", MODEL, "b") == tokens
    assert rise("unmask_provider_tokens_total", "theirs", MODEL, "b") == 7  # as the fault server says
    assert rise("unmask_retries_total", MODEL, "failed") == 1
    assert rise("unmask_router_refusals_total", MODEL, "no_provider") == 1
    assert rise("unmask_hedges_total", MODEL, "true") == 0
    checked = after_requests[f"unmask_provider_conformance_checked_timestamp_seconds {MODEL} a"]
    assert checked >= RUN_BEGAN
    assert after_requests[f"unmask_provider_conformance_distance {MODEL} a worst"] < 1e-9
    upstreams.in_loop(upstreams.pool.reload)
    until(lambda: set(before) <= set(read()))
    again = read()
    counters = [key for key in before if key.startswith("unmask_") and "_total " in key]
    assert all(again[key] >= after_requests[key] for key in counters)


def signed(server_name: str, model_name: object) -> Behaviour:
    """Answer rightly, with a header `server` and a model's name."""

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        content = envelope(list(server.vectors_of(request.texts, ""))) | {"model": model_name}
        return await reply(content, headers={"server": server_name})(server, request, writer)

    return behave


@pytest.mark.parametrize("another", [("nginx", "v2"), ("vllm", "v1"), ("nginx", {"name": "v1"})])
def test_another_server_or_model_name_makes_a_full_run_due(
    upstreams: Upstreams, caplog: pytest.LogCaptureFixture, another: tuple[str, object]
) -> None:
    endpoint = upstreams.await_runs("a")
    endpoint._origins = Origins()
    upstreams.a.script[:] = [signed("nginx", "v1")]
    for _ in range(3):
        assert upstreams.embed(provider={"only": ["a"]}).status == 200
    before = endpoint.conformance
    assert not endpoint.full_due
    upstreams.a.script[:] = [signed(*another)]
    assert upstreams.embed(provider={"only": ["a"]}).headers["x-unmask-provider"] == "a"
    until(lambda: endpoint.conformance is not before)
    assert endpoint.admission == "admitted" and caplog.text.count("model's name in its answers has changed") == 1
    assert "v2" not in caplog.text and "vllm" not in caplog.text  # the provider's words


@pytest.mark.parametrize(("seconds", "runs"), [(61, True), (59, False)])
def test_a_recovery_after_a_minute_makes_a_full_run_due(upstreams: Upstreams, seconds: int, runs: bool) -> None:
    endpoint = upstreams.await_runs("a")
    before, light_runs = endpoint.conformance, []
    pass_light_run = endpoint.pass_light_run

    def recover() -> None:
        endpoint.breaker._state, endpoint.breaker._until = "open", 0.0
        endpoint.breaker._out_since = time.monotonic() - seconds
        endpoint.wake.set()

    def note(started_at: float) -> None:
        pass_light_run(started_at)
        light_runs.append(endpoint.full_due)

    endpoint.pass_light_run = note
    try:
        upstreams.in_loop(recover)
        until(lambda: bool(light_runs))
    finally:
        endpoint.pass_light_run = pass_light_run
    assert light_runs == [runs] and endpoint.breaker.state == "closed"
    if runs:
        until(lambda: endpoint.conformance is not before)
    assert endpoint.admission == "admitted"


def test_pages_show_providers_and_findings(upstreams: Upstreams) -> None:
    def page(path: str) -> str:
        reply = upstreams.service.call("GET", path, headers={"accept": "text/html"}, key=None)
        assert reply.status == 200
        return reply.body.decode()

    for path in (f"/models/{MODEL}", "/status"):
        text = page(path)
        assert "Keeps texts" in text and ">a</th>" in text and "30 days" in text and "quarantined" not in text
    upstreams.take_verdicts({("a", MODEL): "a pools the last token; the model pools the mean"})
    until(lambda: upstreams.endpoint("a").admission == "quarantined")
    for path in (f"/models/{MODEL}", "/status"):
        text = page(path)
        assert "quarantined" in text and "a pools the last token; the model pools the mean" in text


def test_a_verdict_that_was_read_before_a_newer_one_changes_nothing(upstreams: Upstreams) -> None:
    def finding() -> str:
        return upstreams.endpoint("a").finding

    def take(number: int, sentence: str) -> None:
        stale = Verdict(provider="a", model=MODEL, verdict="quarantined", finding=sentence, number=number)
        upstreams.in_loop(upstreams.pool.take_verdicts, {("a", MODEL): stale})
        taken = threading.Event()
        upstreams.in_loop(taken.set)  # the loop calls one after the other
        assert taken.wait(30)

    upstreams.take_verdicts({("a", MODEL): "a was taken out by the operator"})
    until(lambda: finding() == "a was taken out by the operator")
    last, may_store = upstreams.last_number, threading.Event()
    take(last - 1, "a was slow")
    assert finding() == "a was taken out by the operator"

    def store(verdict: Verdict) -> int:
        assert may_store.wait(30)
        return last + 2

    upstreams.pool.report = store  # of this process's own verdict, which takes a while to be stored
    upstreams.order_quarantine("a", "pools the last token")
    until(lambda: finding() == "a pools the last token")
    take(last, "a was slow")
    assert finding() == "a pools the last token"
    may_store.set()
    until(lambda: upstreams.last_number == last + 2)
    take(last + 1, "a was slow")
    assert finding() == "a pools the last token"
    take(last + 3, "a was slow")
    assert finding() == "a was slow"


def test_a_quarantine_reaches_all_processes_and_survives_a_restart(
    vectors_of, tiny_llama: Path, tmp_path: Path, unmask
) -> None:
    url = f"sqlite:///{tmp_path / 'catalogue.sqlite'}"
    database = open_database(url)
    drifted, other_has_heard = threading.Event(), threading.Event()

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        if not drifted.is_set():
            return vectors_of(texts, instruction)
        if len(texts) > 3:  # of a full run, not of a light one
            other_has_heard.wait(60)
        return -vectors_of(texts, instruction)

    def status(service: LocalService) -> str:
        return service.call("GET", f"/v1/models/{MODEL}/endpoints").json["data"][0]["status"]

    with fault_server_thread(drifting) as a:
        file = providers_file(tmp_path, a.url, "http://127.0.0.1:1/v1")
        options: dict[str, Any] = {"providers_file": file, "warm": (), "catalogue": database}
        with (
            running(tiny_llama, intervals=FAST, **options) as watching,
            running(tiny_llama, intervals=WatchIntervals(), **options) as other,
        ):
            until(lambda: status(watching) != "unchecked" and status(other) != "unchecked")
            drifted.set()
            until(lambda: status(watching) == "quarantined")
            until(lambda: status(other) == "quarantined")

            def history() -> list[dict[str, Any]]:
                printed = unmask("providers", "history", "--database", url, "--json").stdout
                return json.loads(printed[printed.index("[\n") :])

            assert len(history()) == 1  # the full run that names the fault is still under way
            other_has_heard.set()
            until(lambda: len(history()) == 2)
            named, at_once = history()
            for verdict in (named, at_once):
                assert (verdict["provider"], verdict["by"], verdict["verdict"]) == ("a", "canaries", "quarantined")
                assert verdict["finding"].startswith("a ") and verdict["last_right"] is not None
            assert "full run" in at_once["finding"] and "full run" not in named["finding"]
        with running(tiny_llama, intervals=FAST, **options) as again:
            assert status(again) == "quarantined"
            drifted.clear()
            assert unmask("providers", "admit", "a", MODEL, "--database", url).returncode == 0
            until(lambda: status(again) == "probation")
            assert "is not quarantined" in unmask("providers", "admit", "a", MODEL, "--database", url).stderr
            reason = ["--reason", "maintenance", "--database", url]
            mistyped = unmask("providers", "quarantine", "aa", MODEL, *reason)
            assert mistyped.returncode == 1
            assert f"there is no provider 'aa' of {MODEL} in the database, and there is no file" in mistyped.stderr
            taken = unmask("providers", "quarantine", "a", MODEL, *reason)
            assert taken.returncode == 0 and f"a gets no more requests for {MODEL};" in taken.stderr
            until(lambda: status(again) == "quarantined")
            got = again.call("POST", "/v1/embeddings", {"model": MODEL, "input": "a text"})
            assert (got.status, got.error["code"]) == (503, "no_conforming_provider")
    database.close()


def test_a_request_is_charged_once_and_every_attempt_is_in_the_books(
    vectors_of, tiny_llama: Path, tmp_path: Path, unmask
) -> None:
    url = f"sqlite:///{tmp_path / 'accounts.sqlite'}"
    accounts = Accounts(url, pepper=tmp_path / "pepper")

    def customer(connection: Connection) -> tuple[str, str]:
        id = people.open_account(connection, "customer", now_ms())
        ledger.top_up(connection, id, 1_000_000_000, "payment", now_ms())
        tariff.set_price(connection, tariff.TariffPrice(MODEL, "default", 8_000_000), now_ms())
        return id, keys.create(connection, accounts.peppers, id, KeySettings(), now_ms())

    with accounts.database.begin() as connection:
        account, key = customer(connection)

    def attempts() -> list[tuple[str, str, str, int, int | None, bool]]:
        with accounts.database.read() as connection:
            rows = connection.execute(sa.select(provider_attempts).where(provider_attempts.c.reason != "probe"))
            return [(r.provider, r.outcome, r.reason, r.cost, r.their_tokens, r.charge is not None) for r in rows]

    def everything() -> list[tuple[str, str, str, int]]:
        with accounts.database.read() as connection:
            rows = connection.execute(sa.select(provider_attempts))
            return [(r.provider, r.outcome, r.reason, r.cost) for r in rows]

    def balance() -> int:
        until(lambda: unsettled() == 0)
        with accounts.database.read() as connection:
            assert verify(connection).drift == ()
            return people.account(connection, account).balance

    def unsettled() -> int:
        with accounts.database.read() as connection:
            return people.account(connection, account).held

    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path, a.url, b.url)
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=SLOW, **options) as service:
            upstreams = Upstreams(a, b, service)

            def embed(**fields: Any) -> Reply:
                body = {"model": MODEL, "input": "a ferry leaves"} | fields
                return service.call("POST", "/v1/embeddings", body, key=key)

            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints))
            a.script[:] = [reply({}, 500)]
            moved = embed(provider={"order": ["a"]})
            assert (moved.status, moved.headers["x-unmask-attempts"]) == (200, "2")
            tokens = moved.json["usage"]["total_tokens"]
            assert balance() == 1_000_000_000 - 8 * tokens
            assert attempts() == [
                ("a", "failed", "answer", money.cost(tokens, 4_000_000), None, True),
                ("b", "answered", "retry", money.cost(7, 4_000_000), 7, True),
            ]
            b.script[:] = [reply({}, 429)]
            nobody = embed()
            assert nobody.status == 503 and balance() == 1_000_000_000 - 8 * tokens
            until(lambda: len(attempts()) == 4)
            assert all(cost == 0 or outcome == "failed" for _, outcome, _, cost, _, _ in attempts()[2:])
            assert not any(is_charged for *_, is_charged in attempts()[2:])
            used = service.call("GET", "/v1/usage?group_by=provider", key=key).json["data"]
            assert [(row["provider"], row["requests"], row["tokens"]) for row in used] == [("b", 1, tokens)]
            b.script[:] = [right]
            upstreams.endpoint("b")._avoid_until = 0.0
            # A caller's price limit, and a price below the provider's.
            dear = embed(provider={"max_price": {"prompt": 0.0079}})
            assert (dear.status, dear.error["code"], dear.error["param"]) == (400, "max_price_exceeded", "provider")
            assert embed(provider={"max_price": {"prompt": 0.008}, "only": ["b"]}).status == 200
            with accounts.database.begin() as connection:
                tariff.set_price(connection, tariff.TariffPrice(MODEL, "batch", 2_000_000), now_ms())
            below = service.call(
                "POST", "/v1/embeddings", {"model": MODEL, "input": TEXTS * 40}, {"x-tier": "batch"}, key
            )
            assert (below.status, below.error["code"]) == (503, "no_provider")
            spent = upstreams.endpoint("b").daily_cost.total(today())
            assert spent == sum(row[3] for row in everything() if row[0] == "b")
    rows = attempts()
    everybody = everything()
    month = datetime.now(UTC).strftime("%Y-%m")
    printed = unmask("providers", "bill", "b", "--month", month, "--database", url, "--json").stdout
    lines = {line["reason"]: line for line in json.loads(printed[printed.index("[\n") :])}
    retries = [row for row in rows if (row[0], row[2]) == ("b", "retry")]
    assert lines["retry"]["attempts"] == len(retries) >= 1
    assert lines["probe"]["attempts"] >= 1 and float(lines["probe"]["dollars"]) > 0
    assert "write it like 2026-11" in unmask("providers", "bill", "b", "--month", "May").stderr
    accounts.close()  # the last sweep books the costs
    total = sum(cost for provider, _, _, cost in everybody if provider == "b")
    with closing(open_database(url)) as database, database.read() as connection:
        report = verify(connection)
        assert report.drift == () and report.cost == sum(cost for *_, cost in everybody)
        assert costs.payables(connection)["b"] == total
    command = ["--month", month, "--database", url]
    same = unmask("providers", "bill", "b", "--invoice", money.format_dollars(total), *command)
    assert same.returncode == 0 and "0.00 more" in same.stderr
    assert unmask("providers", "bill", "b", "--invoice", money.format_dollars(2 * total), *command).returncode == 2
    lower = unmask("providers", "bill", "b", "--invoice", "0", *command)
    assert lower.returncode == 2 and lower.stderr.rstrip().endswith(f": {money.format_dollars(total)} less")
    paid = unmask("providers", "pay", "b", money.format_dollars(total), "--reference", "R1", "--database", url)
    assert paid.returncode == 0 and "0.00 dollars are owed to b" in paid.stderr
    again = unmask("providers", "pay", "b", money.format_dollars(total), "--reference", "R1", "--database", url)
    assert again.returncode == 0 and "nothing has changed" in again.stderr
    assert "was paid with" in unmask("providers", "pay", "b", "1", "--reference", "R1", "--database", url).stderr
    printed = unmask("providers", "margin", *command, "--json").stdout
    line = next(one for one in json.loads(printed[printed.index("[\n") :]) if one["provider"] == "b")
    assert line["requests"] == 2 and line["cost"] == money.format_dollars(total)
    assert line["income"] == money.format_dollars(2 * 8 * tokens)
    assert unmask("ledger", "verify", "--database", url).returncode == 0


def test_a_replay_earns_nothing_at_a_provider(vectors_of, tiny_llama: Path, tmp_path: Path) -> None:
    url, accounts, _, key = customer(tmp_path, KeySettings())
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path, a.url, b.url)
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=SLOW, **options) as service:
            upstreams = Upstreams(a, b, service)
            model = upstreams.pool.models()[MODEL]
            until(lambda: all(e.admission == "admitted" for e in model.endpoints))

            def embed(idempotency_key: str) -> Reply:
                body = {"model": MODEL, "input": "a ferry leaves"}
                return service.call("POST", "/v1/embeddings", body, {"idempotency-key": idempotency_key}, key)

            first, again = embed("one"), embed("one")
            assert (first.status, again.status) == (200, 200)
            assert again.headers["idempotent-replayed"] == "true"
            model.min_margin = 0.1
            assert embed("one").status == 503
            second = embed("two")
            assert second.status == 200  # what is paid for leaves a margin
            with accounts.database.begin() as connection:
                assert ledger.refund(connection, second.headers["x-unmask-charge"], now_ms())
            anew = embed("two")
            assert anew.status == 200 and "idempotent-replayed" not in anew.headers
            assert anew.headers["x-unmask-charge"] != second.headers["x-unmask-charge"]
    accounts.close()


def test_a_slow_answer_is_hedged_charged_once_and_both_costs_are_booked(
    vectors_of, tiny_llama: Path, tmp_path: Path
) -> None:
    url, accounts, account, key = customer(tmp_path, KeySettings())
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(tmp_path, a.url, b.url)
        file.write_text(file.read_text().replace('cost = "0.004"', 'cost = "0.004"\nhedge = true'))
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, intervals=SLOW, **options) as service:
            upstreams = Upstreams(a, b, service)
            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints))

            def embed(**fields: Any) -> Reply:
                body = {"model": MODEL, "input": "a ferry leaves"} | fields
                return service.call("POST", "/v1/embeddings", body, key=key)

            assert embed(provider={"order": ["a"]}).headers["x-unmask-provider"] == "a"
            tokens = embed().json["usage"]["total_tokens"]
            for _ in range(MIN_SAMPLES):
                upstreams.endpoint("a").usual_seconds.add(tokens, 0.01)
            group = upstreams.pool.models()[MODEL]
            group.hedge_budget.deposit(40 * tokens, time.monotonic())
            a.script[:] = [silent]
            hedged = embed(provider={"order": ["a"]})
            assert (hedged.headers["x-unmask-provider"], hedged.headers["x-unmask-attempts"]) == ("b", "2")
            charge = hedged.headers["x-unmask-charge"]
            with accounts.database.read() as connection:
                rows = connection.execute(sa.select(provider_attempts).where(provider_attempts.c.charge == charge))
                booked = {(row.provider, row.outcome, row.reason): row.cost for row in rows}
                assert set(booked) == {("a", "cancelled", "answer"), ("b", "answered", "hedge")}
                assert all(cost > 0 for cost in booked.values())
                assert people.account(connection, account).balance == 1_000_000_000 - 3 * 8 * tokens
                assert verify(connection).drift == ()
            assert upstreams.endpoint("a").breaker.state == "closed"
            # A provider that has cost as much as it may gets nothing until midnight.
            provider = upstreams.endpoint("b").provider
            upstreams.endpoint("b").client.provider = msgspec.structs.replace(provider, max_cost_per_day="0.000000001")
            until(lambda: upstreams.endpoint("b").status(time.monotonic()) == "spent")
            nobody = embed(provider={"only": ["b"]})
            assert (nobody.status, nobody.error["code"]) == (503, "no_provider")
    accounts.close()


def test_canaries_end_the_quarantine_that_they_ordered_and_the_file_is_read_on_demand(
    vectors_of, tiny_llama: Path, tmp_path: Path, unmask
) -> None:
    url = f"sqlite:///{tmp_path / 'catalogue.sqlite'}"
    database, drifted = open_database(url), threading.Event()

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        return -vectors_of(texts, instruction) if drifted.is_set() else vectors_of(texts, instruction)

    with fault_server_thread(drifting) as a:
        file = providers_file(tmp_path, a.url, "http://127.0.0.1:1/v1")
        quick = WatchIntervals(busy=0.3, idle=0.3, second=0.05, full=3600.0, retry=0.1, readmit=0.2)
        options: dict[str, Any] = {"providers_file": file, "warm": (), "catalogue": database}
        with running(tiny_llama, intervals=quick, **options) as service:
            pool = service.models.providers
            assert pool is not None

            def admission() -> str:
                return pool.models()[MODEL].endpoints[0].admission

            until(lambda: admission() == "admitted")
            drifted.set()
            until(lambda: admission() == "quarantined")
            drifted.clear()
            quarantined = len(a.requests)
            file.write_text('readmit = "auto"\n' + file.read_text())
            (tmp_path / "wrong.toml").write_text("[[provider]]\n")
            refusal = unmask("providers", "reload", "--providers", str(tmp_path / "wrong.toml"), "--database", url)
            assert refusal.returncode != 0 and "wrong.toml: provider[0]" in refusal.stderr
            assert pool.settings.readmit == "operator"
            assert unmask("providers", "reload", "--providers", str(file), "--database", url).returncode == 0
            until(lambda: pool.settings.readmit == "auto")
            until(lambda: admission() == "admitted")
            assert len(a.requests) - quarantined > 2 * 10  # two full runs and the one that admits
            printed = unmask("providers", "history", "--database", url, "--json").stdout
            events = [(one["verdict"], one["by"]) for one in json.loads(printed[printed.index("[\n") :])]
            assert ("admitted", "canaries") in events and ("reload", "command line") in events
    database.close()
