"""The API with accounts: keys, limits, costs, and that each request is charged once."""

import asyncio
import csv
import io
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import Connection

from tests.api.live import KEY, LocalService, Reply, running, until
from unmask.accounts import Accounts, idempotency, keys, ledger, people, tariff, usage
from unmask.accounts.accounts import MOST_REPORTS
from unmask.accounts.keys import KeySettings
from unmask.accounts.verification import verify
from unmask.api.charging import go_duration
from unmask.engine import Engine
from unmask.errors import EngineError, StorageError, UsageError
from unmask.storage.database import now_ms

PRICE = 8_000_000  # nano-dollars per million tokens: eight per token
BATCH = 3_500_000


class Bank:
    """The accounts of a server. Tests read and change them without HTTP."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self._numbers = iter(range(10_000))

    def do(self, piece: Callable[[Connection], Any]) -> Any:
        with self.accounts.database.begin() as connection:
            return piece(connection)

    def customer(self, nano: int = 1_000_000_000, **settings: Any) -> tuple[str, str]:
        """An account with credit, and a key to it."""
        now = now_ms()
        number = next(self._numbers)

        def make(connection: Connection) -> tuple[str, str]:
            id = people.open_account(connection, f"customer {number}", now)
            if nano:
                ledger.top_up(connection, id, nano, f"payment {number}", now)
            return id, keys.create(connection, self.accounts.peppers, id, KeySettings(**settings), now)

        return self.do(make)

    def balance(self, account: str) -> tuple[int, int]:
        """Return balance and held amount once nothing is in flight."""
        until(lambda: self.do(lambda connection: people.account(connection, account)).held == 0)
        row = self.do(lambda connection: people.account(connection, account))
        assert self.do(verify).drift == ()
        return row.balance, row.held


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    folder = tmp_path_factory.mktemp("accounts")
    accounts = Accounts(f"sqlite:///{folder / 'accounts.sqlite'}", pepper=folder / "pepper")
    yield Bank(accounts)
    accounts.close()


@pytest.fixture(scope="module")
def paid(bank: Bank, tiny_llama: Path) -> Iterator[LocalService]:
    """A server with accounts, whose model has a price."""
    with running(tiny_llama, bank.accounts, api_keys=(), accounts_url="kept by the test") as service:
        now = now_ms()
        bank.do(
            lambda connection: tariff.set_price(connection, tariff.TariffPrice(service.model, "default", PRICE), now)
        )
        bank.do(lambda connection: tariff.set_price(connection, tariff.TariffPrice(service.model, "batch", BATCH), now))
        yield service


def embed(service: LocalService, key: str | None, input: Any = "a text", **more: Any) -> Reply:
    headers = more.pop("headers", None)
    return service.call("POST", "/v1/embeddings", {"model": service.model, "input": input} | more, headers, key)


def test_a_request_costs_what_its_tokens_cost(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    reply = embed(paid, key, ["some text", "some more of it"])
    assert reply.status == 200
    usage = reply.json["usage"]
    cost = usage["total_tokens"] * 8
    assert reply.headers["x-unmask-cost-nanodollars"] == str(cost)
    assert f'"cost":0.{cost:09d}'.rstrip("0").encode() in reply.body
    assert reply.headers["x-unmask-tier"] == "default"
    assert bank.balance(account) == (1_000_000_000 - cost, 0)


def test_the_batch_tier_has_its_own_price(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    reply = embed(paid, key, headers={"x-tier": "Batch"})
    tokens = reply.json["usage"]["total_tokens"]
    cost = -(-tokens * 7 // 2)  # 3.5 a token, a part of a nano-dollar counting as a whole one
    assert (reply.headers["x-unmask-tier"], reply.headers["x-unmask-cost-nanodollars"]) == ("batch", str(cost))
    assert bank.balance(account) == (1_000_000_000 - cost, 0)
    unknown_tier = embed(paid, key, headers={"x-tier": "gold"})
    assert (unknown_tier.status, unknown_tier.error["param"]) == (400, "X-Tier")


def test_the_standard_tier_is_the_default_one(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    replies = [embed(paid, key, headers={"x-tier": tier}) for tier in ("standard", " Standard", "default")]
    assert {(reply.status, reply.headers["x-unmask-tier"]) for reply in replies} == {(200, "default")}
    total = sum(reply.json["usage"]["total_tokens"] * 8 for reply in replies)
    assert bank.balance(account) == (1_000_000_000 - total, 0)


def test_without_credit(bank: Bank, paid: LocalService):
    account, key = bank.customer(nano=10)
    reply = embed(paid, key)
    assert reply.status == 429
    assert (reply.error["type"], reply.error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert "has 0.00000001 dollars of free credit" in reply.error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    assert bank.balance(account) == (10, 0)


def test_without_credit_as_402_on_request(bank: Bank, tiny_llama: Path, paid: LocalService):
    _, key = bank.customer(nano=0)
    with running(tiny_llama, bank.accounts, api_keys=(), accounts_url="kept", credit_status=402) as service:
        assert embed(service, key).status == 402


def test_openais_client_reads_the_refusal(bank: Bank, paid: LocalService):
    _, key = bank.customer(nano=0)
    client = openai.OpenAI(base_url=f"{paid.url}/v1", api_key=key)
    with pytest.raises(openai.RateLimitError) as refused:
        client.embeddings.create(model=paid.model, input="a text")
    assert refused.value.code == "insufficient_quota"
    client.close()


@pytest.mark.parametrize("unknown_key", ["", "x", "um_", KEY, "um_0123456789ab_" + "0" * 49])
def test_an_unknown_key(paid: LocalService, unknown_key: str):
    reply = embed(paid, unknown_key)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert not unknown_key or unknown_key not in reply.body.decode()


def test_a_key_that_fits_but_for_one_letter(bank: Bank, paid: LocalService):
    _, key = bank.customer()
    for position in (5, 20, -1):
        letter = "A" if key[position] != "A" else "B"
        typo = key[:position] + letter + (key[position + 1 :] if position != -1 else "")
        assert embed(paid, typo).status == 401


def test_revoked_and_expired_keys(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    bank.do(lambda connection: keys.revoke(connection, account, keys.key_id(key), now_ms()))
    _, old = bank.customer(expires_at=now_ms() - 1)
    for refused, why in ((key, "revoked"), (old, "expired")):
        reply = embed(paid, refused)
        assert reply.status == 401 and why in reply.error["message"]


def test_a_key_that_ends_while_it_is_remembered_spends_nothing_more(bank: Bank, paid: LocalService):
    # As from another process: this one learns of it by looking.
    account, key = bank.customer()
    frozen, other = bank.customer()
    assert embed(paid, key).status == embed(paid, other).status == 200
    balances = bank.balance(account), bank.balance(frozen)
    bank.do(lambda connection: keys.revoke(connection, account, keys.key_id(key), now_ms()))
    bank.do(lambda connection: people.set_frozen(connection, frozen, frozen=True))
    assert embed(paid, key).status == 401
    assert embed(paid, other).status == 403
    assert (bank.balance(account), bank.balance(frozen)) == balances
    until(lambda: paid.call("GET", "/v1/account", key=key).status == 401)
    until(lambda: paid.call("GET", "/v1/account", key=other).status == 403)


def test_what_this_server_changes_about_a_key_counts_at_once(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    assert paid.call("GET", "/v1/account", key=key).status == 200
    asyncio.run(bank.accounts.write(lambda c: keys.revoke(c, account, keys.key_id(key), now_ms())))
    assert paid.call("GET", "/v1/account", key=key).status == 401


def test_a_remembered_key_expires_on_time(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    moments = [now_ms()]
    monkeypatch.setattr("unmask.accounts.accounts.now_ms", lambda: moments[-1])
    _, key = bank.customer(expires_at=moments[0] + 700)
    assert paid.call("GET", "/v1/account", key=key).status == 200
    moments.append(moments[0] + 699)
    assert paid.call("GET", "/v1/account", key=key).status == 200
    moments.append(moments[0] + 700)
    reply = paid.call("GET", "/v1/account", key=key)
    assert reply.status == 401 and "expired" in reply.error["message"]


def test_a_key_is_for_what_it_was_made_for(bank: Bank, paid: LocalService):
    _, reading = bank.customer(scopes=("account",))
    _, embedding = bank.customer(scopes=("embeddings",), models=(paid.model,))
    _, other = bank.customer(models=("another/model",))
    _, elsewhere = bank.customer(networks=("203.0.113.0/24",))
    _, here = bank.customer(networks=("203.0.113.0/24", "127.0.0.1"))
    refused = [
        embed(paid, reading),
        embed(paid, other),
        embed(paid, elsewhere),
        paid.call("GET", "/v1/usage", key=embedding),
    ]
    for reply in refused:
        assert (reply.status, reply.error["code"]) == (403, "permission_denied"), reply.body
    assert embed(paid, embedding).status == embed(paid, here).status == 200


def test_a_frozen_account(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    bank.do(lambda connection: people.set_frozen(connection, account, frozen=True))
    reply = embed(paid, key)
    assert reply.status == 403 and "frozen" in reply.error["message"]


def test_a_spend_limit(bank: Bank, paid: LocalService):
    account, key = bank.customer(spend_limit=100, spend_window="day")
    statuses = [embed(paid, key).status for _ in range(8)]
    assert statuses[0] == 200 and statuses[-1] == 429
    assert embed(paid, key).error["code"] == "insufficient_quota"
    balance, _ = bank.balance(account)
    assert 1_000_000_000 - 100 <= balance < 1_000_000_000


def test_requests_per_minute(bank: Bank, paid: LocalService):
    _, key = bank.customer(requests_per_minute=3, tokens_per_minute=1000)
    replies = [embed(paid, key) for _ in range(4)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"3"}
    refused = replies[-1]
    assert (refused.error["type"], refused.error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-should-retry"] == "true"
    assert re.fullmatch(r"(\d+m)?[\d.]+m?s", refused.headers["x-ratelimit-reset-requests"])
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"


def test_tokens_per_minute_are_taken_before_the_work(bank: Bank, paid: LocalService):
    account, key = bank.customer(tokens_per_minute=20)
    first = embed(paid, key, "a few words")
    used = first.json["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-remaining-tokens"] == str(20 - used)
    assert "x-ratelimit-limit-requests" not in first.headers
    second = embed(paid, key, "some more of these words, and some more of them")
    assert (second.status, second.error["type"]) == (429, "tokens")
    larger = embed(paid, key, "far more words than that " * 10)
    assert (larger.status, larger.headers["x-should-retry"]) == (429, "false")
    assert bank.balance(account) == (1_000_000_000 - used * 8, 0)


def test_a_plan_limits_all_keys_of_an_account_together(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    second = bank.do(lambda c: keys.create(c, bank.accounts.peppers, account, KeySettings(), now_ms()))
    bank.do(lambda connection: tariff.set_plan(connection, tariff.RatePlan("small", 3, None)))
    bank.do(lambda connection: tariff.assign_plan(connection, account, "small"))
    statuses = [
        embed(paid, key).status,
        embed(paid, second).status,
        embed(paid, key).status,
        embed(paid, second).status,
    ]
    assert statuses == [200, 200, 200, 429]


def test_work_that_fails_costs_nothing(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    account, key = bank.customer()

    async def broken(self: Engine, prompts: Any, **more: Any) -> None:
        raise EngineError("the model failed on this request")

    monkeypatch.setattr(Engine, "run", broken)
    assert embed(paid, key).status == 503
    assert bank.balance(account) == (1_000_000_000, 0)


def test_a_caller_who_leaves_pays_nothing(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    account, key = bank.customer()
    started = threading.Event()

    async def slow(self: Engine, prompts: Any, **more: Any) -> None:
        started.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(Engine, "run", slow)
    with paid.connect() as connection:
        body = f'{{"model": "{paid.model}", "input": "a text"}}'.encode()
        connection.sendall(paid.raw_request(body).replace(KEY.encode(), key.encode()))
        assert started.wait(60)
        assert bank.do(lambda c: people.account(c, account)).held > 0
    assert bank.balance(account) == (1_000_000_000, 0)


def test_no_charge_no_answer(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    account, key = bank.customer()

    async def lost(self: Accounts, *booked: object) -> None:
        raise StorageError("the disk is full at /private/path")

    monkeypatch.setattr(Accounts, "settle", lost)
    reply = embed(paid, key)
    assert (reply.status, reply.error["code"]) == (503, "storage_unavailable")
    assert "/private/path" not in reply.body.decode()
    assert bank.balance(account) == (1_000_000_000, 0)


def test_a_repeated_request_is_charged_once(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    headers = {"idempotency-key": "order-1"}
    first = embed(paid, key, headers=headers)
    again = embed(paid, key, headers=headers)
    assert first.status == again.status == 200
    assert first.body == again.body
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    assert first.headers["x-unmask-charge"] == again.headers["x-unmask-charge"]
    cost = int(first.headers["x-unmask-cost-nanodollars"])
    assert bank.balance(account) == (1_000_000_000 - cost, 0)
    other = embed(paid, key, "another text", headers=headers)
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")
    tier = embed(paid, key, headers=headers | {"x-tier": "batch"})
    assert tier.status == 422
    for malformed_key in ("", "x" * 256, "two words"):
        reply = embed(paid, key, headers={"idempotency-key": malformed_key})
        assert (reply.status, reply.error["param"]) == (400, "Idempotency-Key")


def test_a_request_is_repeated_a_few_times_only(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    headers = {"idempotency-key": "order-again"}
    replies = [embed(paid, key, headers=headers) for _ in range(1 + idempotency.MAX_REPLAYS)]
    assert {reply.status for reply in replies} == {200}
    refused = embed(paid, key, headers=headers)
    assert (refused.status, refused.error["code"]) == (409, "idempotency_key_exhausted")
    assert refused.error["param"] == "Idempotency-Key" and "new Idempotency-Key" in refused.error["message"]
    assert refused.headers["x-should-retry"] == "false" and "retry-after" not in refused.headers
    cost = int(replies[0].headers["x-unmask-cost-nanodollars"])
    assert bank.balance(account) == (1_000_000_000 - cost, 0)
    anew = embed(paid, key, headers={"idempotency-key": "order-anew"})
    assert anew.status == 200 and bank.balance(account) == (1_000_000_000 - 2 * cost, 0)


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_repeated_requests_count_against_the_limits(bank: Bank, paid: LocalService, kind: str):
    _, probe = bank.customer()
    tokens = embed(paid, probe).json["usage"]["total_tokens"]
    _, key = bank.customer(**{f"{kind}_per_minute": 2 * (tokens if kind == "tokens" else 1)})
    headers = {"idempotency-key": "order-limited"}
    replies = [embed(paid, key, headers=headers) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert replies[1].headers["idempotent-replayed"] == "true"
    assert replies[2].error["type"] == kind


def test_a_repeated_request_while_the_first_runs(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    account, key = bank.customer()
    started, go = threading.Event(), threading.Event()
    real = Engine.run

    async def slow(self: Engine, prompts: Any, **more: Any) -> Any:
        started.set()
        await asyncio.to_thread(go.wait, 300)
        return await real(self, prompts, **more)

    monkeypatch.setattr(Engine, "run", slow)
    headers = {"idempotency-key": "order-2"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(embed, paid, key, headers=headers)
        assert started.wait(60)
        reply = embed(paid, key, headers=headers)
        go.set()
        assert first.result().status == 200
    assert (reply.status, reply.error["code"]) == (409, "request_in_progress")
    assert reply.headers["retry-after"] == "1"
    assert bank.balance(account)[0] < 1_000_000_000


def test_a_model_without_a_price(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    for tier in tariff.TIERS:
        bank.do(lambda connection, tier=tier: tariff.remove_price(connection, paid.model, tier))
    bank.accounts._prices.clear()
    try:
        reply = embed(paid, key)
        assert (reply.status, reply.error["code"]) == (503, "model_not_priced")
    finally:
        bank.do(lambda c: tariff.set_price(c, tariff.TariffPrice(paid.model, "default", PRICE), 1))
        bank.do(lambda c: tariff.set_price(c, tariff.TariffPrice(paid.model, "batch", BATCH), 1))
    assert bank.balance(account) == (1_000_000_000, 0)


def test_a_caller_may_choose_the_request_id_but_not_what_it_pays(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    replies = [embed(paid, key, headers={"x-request-id": "always-the-same"}) for _ in range(3)]
    total = sum(int(reply.headers["x-unmask-cost-nanodollars"]) for reply in replies)
    assert bank.balance(account) == (1_000_000_000 - total, 0)


def test_the_account_as_its_key_sees_it(bank: Bank, paid: LocalService):
    account, key = bank.customer(name="laptop", spend_limit=5_000_000_000, spend_window="month")
    embed(paid, key)
    info = paid.call("GET", "/v1/account", key=key).json
    balance, _ = bank.balance(account)
    dollars = f"0.{balance:09d}".rstrip("0")
    assert (info["id"], info["status"], info["currency"]) == (account, "active", "USD")
    assert info["balance"] == info["available"] == dollars and info["held"] == "0.00"
    assert (info["key"]["id"], info["key"]["name"]) == (keys.key_id(key), "laptop")
    assert (info["key"]["spend_limit"], info["key"]["spend_window"]) == ("5.00", "month")
    listed = paid.call("GET", "/v1/keys", key=key)
    assert [one["id"] for one in listed.json["data"]] == [keys.key_id(key)]
    assert key.rsplit("_", 1)[1] not in listed.body.decode()


def test_usage_by_day_model_and_key(bank: Bank, paid: LocalService):
    account, key = bank.customer()
    second = bank.do(lambda c: keys.create(c, bank.accounts.peppers, account, KeySettings(), now_ms()))
    replies = [embed(paid, key), embed(paid, key, headers={"x-tier": "batch"}), embed(paid, second)]
    total = sum(int(reply.headers["x-unmask-cost-nanodollars"]) for reply in replies)
    report = paid.call("GET", "/v1/usage", key=key).json
    assert {(row["key"], row["tier"]) for row in report["data"]} == {
        (keys.key_id(key), "default"),
        (keys.key_id(key), "batch"),
        (keys.key_id(second), "default"),
    }
    assert all(row["model"] == paid.model for row in report["data"])
    (row,) = paid.call("GET", "/v1/usage?group_by=model", key=second).json["data"]
    assert (row["requests"], row["cost"], row["day"]) == (3, f"0.{total:09d}".rstrip("0"), None)
    rows = list(csv.DictReader(io.StringIO(paid.call("GET", "/v1/usage?format=csv", key=key).body.decode())))
    assert len(rows) == 3 and sum(int(row["tokens"]) for row in rows) == row_tokens(report)
    long_ago = (datetime.now(UTC) - timedelta(days=40)).date()
    assert paid.call("GET", f"/v1/usage?start={long_ago}&end={long_ago}", key=key).json["data"] == []
    assert paid.call("GET", "/v1/usage?start=9999-12-31&end=9999-12-31", key=key).json["data"] == []


def row_tokens(report: dict[str, Any]) -> int:
    return sum(row["tokens"] for row in report["data"])


@pytest.mark.parametrize(
    "query", ["start=yesterday", "end=2026-13-01", "start=2020-01-01", "start=2999-01-01", "group_by=who", "format=xml"]
)
def test_wrong_parameters_of_usage(bank: Bank, paid: LocalService, query: str):
    _, key = bank.customer()
    reply = paid.call("GET", f"/v1/usage?{query}", key=key)
    name, value = query.split("=")
    assert (reply.status, reply.error["param"]) == (400, name)
    assert value in reply.error["message"]


@pytest.mark.parametrize("parameter", ["key", "api_key", "access_token"])
def test_a_key_in_the_url_is_refused_by_name(bank: Bank, paid: LocalService, parameter: str):
    _, key = bank.customer()
    reply = paid.call("GET", f"/v1/account?{parameter}={key}", key=None)
    assert (reply.status, reply.error["code"]) == (400, "key_in_url")
    assert key not in reply.body.decode()


def test_one_account_never_sees_another(bank: Bank, paid: LocalService):
    """Call every reading route of the OpenAPI document with the keys of two accounts."""
    first, one = bank.customer(name="one's own")
    second, two = bank.customer(name="two's own")
    charges = {key: embed(paid, key).headers["x-unmask-charge"] for key in (one, two)}
    routes = [path for path, item in paid.call("GET", "/openapi.json", key=one).json["paths"].items() if "get" in item]
    assert {"/v1/account", "/v1/usage", "/v1/keys"} <= set(routes)
    for own, key, other, other_key in ((first, one, second, two), (second, two, first, one)):
        foreign = (other, keys.key_id(other_key), charges[other_key], other_key)
        for path in routes:
            for query in ("", f"?account={other}&account_id={other}", f"?key_id={keys.key_id(other_key)}"):
                reply = paid.call("GET", path.replace("{id}", other) + query, headers={"x-account": other}, key=key)
                assert reply.status in (200, 404), reply.body
                text = reply.body.decode()
                assert reply.status == 404 or not any(secret in text for secret in foreign), path
        assert paid.call("GET", "/v1/account", key=key).json["id"] == own


def test_one_account_cannot_use_what_is_anothers(bank: Bank):
    """Call the functions behind the pages with another account's ids: each checks the owner."""
    first, one = bank.customer()
    second, _ = bank.customer()
    id, now = keys.key_id(one), now_ms()
    attempts: list[Callable[[Connection], Any]] = [
        lambda c: keys.revoke(c, second, id, now),
        lambda c: keys.rotate(c, bank.accounts.peppers, second, id, now),
        lambda c: keys.change(c, second, id, KeySettings(), now),
    ]
    for attempt in attempts:
        with pytest.raises(Exception, match=f"no key {id}"):
            bank.do(attempt)
    assert [key.id for key in bank.do(lambda c: keys.list_keys(c, first, now))] == [id]
    assert id not in [key.id for key in bank.do(lambda c: keys.list_keys(c, second, now))]


@pytest.mark.parametrize("path", ["/v1/account", "/v1/usage", "/v1/keys"])
def test_reading_an_account_is_a_request_of_its_limit(bank: Bank, paid: LocalService, path: str):
    _, key = bank.customer(requests_per_minute=1)
    first, second = (paid.call("GET", path, key=key) for _ in range(2))
    assert (first.status, first.headers["x-ratelimit-limit-requests"]) == (200, "1")
    assert (second.status, second.error["code"]) == (429, "rate_limit_exceeded")
    assert int(second.headers["retry-after"]) > 0
    assert embed(paid, key).status == 429
    _, unlimited = bank.customer()
    assert [paid.call("GET", path, key=unlimited).status for _ in range(5)] == [200] * 5


def test_reports_hold_up_no_other_request(bank: Bank, paid: LocalService, monkeypatch: pytest.MonkeyPatch):
    _, key = bank.customer()
    may_end, num_begun = threading.Event(), threading.Semaphore(0)
    totals = usage.usage_totals

    def slow_totals(*arguments: Any) -> Any:
        num_begun.release()
        assert may_end.wait(60)
        return totals(*arguments)

    monkeypatch.setattr(usage, "usage_totals", slow_totals)
    with ThreadPoolExecutor(MOST_REPORTS) as pool:
        reports = [pool.submit(paid.call, "GET", "/v1/usage", key=key) for _ in range(MOST_REPORTS)]
        try:
            assert num_begun.acquire(timeout=60)
            until(lambda: not bank.accounts._free_reports._value)
            # More are refused, and a key that nobody has asked for yet is read from the tables.
            refused = paid.call("GET", "/v1/account", key=key)
            assert (refused.status, refused.error["code"]) == (503, "statistics_busy")
            assert int(refused.headers["retry-after"]) > 0 and refused.headers["x-should-retry"] == "true"
            assert embed(paid, bank.customer()[1]).status == 200
        finally:
            may_end.set()
        assert {report.result().status for report in reports} == {200}
    assert paid.call("GET", "/v1/account", key=key).status == 200


def test_uses_are_noted_in_batches(bank: Bank, paid: LocalService):
    _, key = bank.customer()
    before = now_ms()
    embed(paid, key)
    bank.accounts.sweep()
    (info,) = paid.call("GET", "/v1/keys", key=key).json["data"]
    assert before // 1000 <= info["last_used"] <= now_ms() // 1000


def test_health_asks_nobody(paid: LocalService):
    assert paid.call("GET", "/health", key=None).status == 200
    assert paid.call("GET", "/v1/models", key=None).status == 401


def test_without_accounts_there_are_no_account_routes(service: LocalService):
    for path in ("/v1/account", "/v1/usage", "/v1/keys"):
        assert service.call("GET", path).status == 404
    reply = service.embed("a text")
    assert "cost" not in reply.json["usage"] and "x-unmask-charge" not in reply.headers


def test_accounts_and_a_key_file_exclude_each_other():
    from unmask.api import ServeSettings

    with pytest.raises(UsageError, match="use one of them"):
        ServeSettings(api_keys=("k",), accounts_url="sqlite:///x")
    assert ServeSettings(host="0.0.0.0", accounts_url="sqlite:///x").host == "0.0.0.0"
    assert "secret" not in repr(ServeSettings(accounts_url="postgresql://me:secret@host/x"))


def test_limits_for_several_servers_are_those_of_accounts():
    from unmask.api import ServeSettings

    with pytest.raises(UsageError, match="turn on accounts"):
        ServeSettings(limits_url="redis://host")
    assert "secret" not in repr(ServeSettings(accounts_url="sqlite:///x", limits_url="redis://:secret@host"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.02, "20ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")],
)
def test_durations_are_gos(seconds: float, text: str):
    assert go_duration(seconds) == text
