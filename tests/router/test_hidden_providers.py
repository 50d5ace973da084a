"""`unmask serve --hide-providers`: callers learn no name, place or cost of a provider; the operator sees them all."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.api.live import Reply, running, until
from tests.router.fault_server import fault_server_thread, reply, right
from tests.router.test_providers import MODEL, SLOW, TEXTS, Upstreams, customer
from tests.web.conftest import HTML
from tests.web.people import Visitor, key_of, person
from unmask.accounts.keys import KeySettings
from unmask.encoder import Encoder
from unmask.router import ProviderPreferences, PublicNames
from unmask.web import website

SECRETS = ("acme-cloud", "gpu-cellar", '"DE"', "(DE)", "0.0123457", "bound by contract")

names = st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,8}", fullmatch=True), max_size=60, unique=True)


@given(names, names)
def test_letters_are_distinct_and_outlast_new_providers(first: list[str], new: list[str]) -> None:
    before = PublicNames.of(first, hides=True)
    after = PublicNames.of(dict.fromkeys([*first, *new]), hides=True)
    letters = [after.public_name(name) for name in dict.fromkeys([*first, *new]) if name != "local"]
    assert len({*letters}) == len(letters) and not {*letters} & {*first, *new, "local"}
    assert all(before.public_name(name) == after.public_name(name) for name in first)
    everybody = tuple(name for name in first if name != "local")
    wishes = ProviderPreferences(only=tuple(map(before.public_name, everybody)), order=everybody)
    meant = before.real_preferences(wishes)
    assert meant.only == everybody and not {*meant.order} & {*first}  # a real name is guessed in vain
    assert PublicNames().real_preferences(wishes) == wishes


def test_callers_learn_nothing_and_the_operator_everything(tiny_llama: Path, encoder: Encoder, tmp_path: Path) -> None:
    lock, drifted = threading.Lock(), threading.Event()

    def vectors_of(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    def drifting(texts: Sequence[str], instruction: str) -> np.ndarray:
        vectors = vectors_of(texts, instruction)
        return np.roll(vectors, 3, axis=1) if drifted.is_set() else vectors

    url, accounts, _, _ = customer(tmp_path, KeySettings())
    admin, owner = (person(accounts, f"{name}@example.org", admin=name == "admin") for name in ("admin", "owner"))
    key = key_of(accounts, owner, scopes=("embeddings", "account"))
    with fault_server_thread(drifting) as a, fault_server_thread(vectors_of) as b:
        file = tmp_path / "providers.toml"
        file.write_text(
            f'remote_only = ["{MODEL}"]\n'
            + "".join(
                f'[[provider]]\nname = "{name}"\nkind = "openai"\nurl = "{place}"\nprivate = true\ncountry = "DE"\n'
                f'[[provider.model]]\nid = "{MODEL}"\ncost = "0.0123457"\nallow_loss = true\n'
                for name, place in (("acme-cloud", a.url), ("gpu-cellar", b.url))
            )
        )
        options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
        with running(tiny_llama, accounts, website, intervals=SLOW, hide_providers=True, **options) as service:
            endpoints = service.models.providers.models()[MODEL].endpoints  # pyright: ignore[reportOptionalMemberAccess]
            until(lambda: all(endpoint.admission == "admitted" for endpoint in endpoints))
            upstreams, customers = Upstreams(a, b, service), Visitor.signed_in(service, accounts, owner)

            def embed(**fields: Any) -> Reply:
                return service.call("POST", "/v1/embeddings", {"model": MODEL, "input": TEXTS[0]} | fields, key=key)

            def get(path: str, **headers: str) -> Reply:
                return service.call("GET", path, headers=headers, key=key)

            first, second = (embed(provider={"only": [letter]}) for letter in "AB")
            assert [got.headers["x-unmask-provider"] for got in (first, second)] == ["A", "B"]
            assert embed(provider={"ignore": ["A"]}).headers["x-unmask-provider"] == "B"
            guessed = embed(provider={"only": ["gpu-cellar"]})
            unknown = embed(provider={"only": ["Z"]})
            # The answer repeats the word of its caller, and is the same for a name that nobody has.
            assert [got.status for got in (guessed, unknown)] == [400, 400]
            assert guessed.error["message"].replace("gpu-cellar", "Z") == unknown.error["message"]
            for server in (a, b):
                server.script[:] = [reply({"error": "acme-cloud"}, 503)]
            failed = embed()
            assert failed.status == 503
            for server in (a, b):
                server.script[:] = [right]
            upstreams.take_verdicts({("gpu-cellar", MODEL): "gpu-cellar was bound by contract"})
            drifted.set()

            def check() -> None:
                endpoints[0].breaker._state, endpoints[0].breaker._until = "open", 0.0  # a canary is due
                endpoints[0].wake.set()

            upstreams.in_loop(check)
            until(lambda: all(endpoint.admission == "quarantined" for endpoint in endpoints))
            until(lambda: "rotates" in endpoints[0].finding)

            listed = get(f"/v1/models/{MODEL}/endpoints").json["data"]
            described = [(one["name"], one["kind"], one["country"], one["conformance"]["finding"]) for one in listed]
            assert described == [
                ("A", "remote", None, "A rotates or mirrors the space: only inner products are right"),
                ("B", "remote", None, "B was taken out of traffic"),
            ]
            used = get("/v1/usage?group_by=provider").json
            assert sorted(row["provider"] for row in used["data"]) == ["A", "B"]
            assert [line["provider"] for line in used["tainted"]] == ["A"]
            seen = [
                first, second, unknown, failed, embed(), get("/v1/models"), get(f"/v1/models/{MODEL}/endpoints"),
                get("/v1/usage?group_by=provider"), get("/v1/usage?group_by=provider&format=csv"), get("/metrics"),
                get("/ready"), get(f"/models/{MODEL}", **HTML), get(f"/models/{MODEL}.json"),
                get(f"/models/{MODEL}.md"), get("/status", **HTML), get("/llms.txt"), customers.get("/account"),
            ]  # fmt: skip
            for got in seen:
                text = "\n".join(got.headers.values()) + got.body.decode()
                places = [server.url.removeprefix("http://").removesuffix("/v1") for server in (a, b)]
                assert not [secret for secret in (*SECRETS, *places) if secret in text], text
            metrics = get("/metrics").body.decode()
            assert 'unmask_provider_admitted{model="tiny_llama",provider="A"} 0.0' in metrics
            counter = (
                'unmask_provider_attempts_total{model="tiny_llama",outcome="answered",provider="A",reason="answer"}'
            )
            assert counter in metrics and "cost_nanodollars" not in metrics

            page = Visitor.signed_in(service, accounts, admin).get("/admin/providers").body.decode()
            assert all(
                secret in page for secret in ("acme-cloud", "gpu-cellar", "(DE)", "0.0123457", "bound by contract")
            )
    accounts.close()
