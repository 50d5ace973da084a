"""A running server follows the operator: live at once, deprecated with headers, retired at once."""

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import numpy as np
import pytest

from tests.api.live import LocalService, running, until
from unmask.api.settings import ServeSettings
from unmask.catalogue.canary import make_canary
from unmask.catalogue.store import put_fields, step
from unmask.encoder import Encoder
from unmask.router import CatalogueSync, ModelRegistry
from unmask.server.composition import open_models
from unmask.storage.database import Database

MODEL = "org/gemma"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'catalogue.sqlite'}")
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def service(tiny_llama: Path, database: Database) -> Iterator[LocalService]:
    with running(tiny_llama, catalogue=database) as started:
        yield started


def go_live(database: Database, source: Path, model: str = MODEL, **fields: object) -> None:
    """As the last gate leaves a model."""
    with database.begin() as connection:
        put_fields(connection, model, fields, source=str(source))
        for status in ("coming soon", "benchmarking", "staged", "live"):
            step(connection, model, status, actor="test")


def embed(service: LocalService, model: str = MODEL):
    return service.call("POST", "/v1/embeddings", {"model": model, "input": "a text"}, {"prefer": "wait=60"})


def listed(service: LocalService) -> list[str]:
    return [model["id"] for model in service.call("GET", "/v1/models").json["data"]]


def test_from_live_to_retired_without_a_restart(service: LocalService, database: Database, golden_dir: Path) -> None:
    assert embed(service).status == 404
    encoder = Encoder.load(golden_dir / "tiny_gemma", compat="reference")
    canary = make_canary("a canary", encoder.encode("a canary")[0])
    go_live(
        database, golden_dir / "tiny_gemma", compat="reference", revision=encoder.checkpoint.revision,
        canary={"text": canary.text, "vector": canary.vector},
    )  # fmt: skip
    until(lambda: MODEL in listed(service))
    reply = embed(service)
    assert reply.status == 200, reply.body
    np.testing.assert_allclose(reply.vectors, encoder.encode("a text", normalize=True), atol=1e-6)
    assert "deprecation" not in reply.headers
    assert service.call("GET", f"/v1/models/{MODEL}").json["lifecycle"] == "live"
    assert service.call("GET", "/ready").json["models"][MODEL] == "ok"

    last = datetime.now(UTC).date() + timedelta(days=30)
    with database.begin() as connection:
        record = step(connection, MODEL, "deprecated", actor="test", until=last)
    until(lambda: service.call("GET", f"/v1/models/{MODEL}").json["lifecycle"] == "deprecated")
    reply = embed(service)
    assert reply.status == 200
    since = datetime.combine(record.history[-1].on, datetime.min.time(), UTC)
    assert reply.headers["deprecation"] == f"@{since.timestamp():.0f}"
    # On its last day it still answers.
    assert parsedate_to_datetime(reply.headers["sunset"]) == datetime.combine(
        last + timedelta(days=1), datetime.min.time(), UTC
    )
    entry = service.call("GET", f"/v1/models/{MODEL}")
    assert entry.json["shutdown_date"] == last.isoformat() and entry.headers["sunset"] == reply.headers["sunset"]

    with database.begin() as connection:
        step(connection, MODEL, "retired", actor="test")
    until(lambda: MODEL not in listed(service))
    reply = embed(service)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (410, "model_retired", "model")
    assert "was retired on" in reply.error["message"] and reply.headers["x-should-retry"] == "false"
    assert service.call("GET", f"/v1/models/{MODEL}").status == 410
    assert service.embed("a text").status == 200  # the other one goes on


def test_what_was_accepted_is_finished(service: LocalService, database: Database, golden_dir: Path) -> None:
    go_live(database, golden_dir / "tiny_gemma")
    until(lambda: MODEL in listed(service))
    assert embed(service).status == 200
    served = service.models.find(MODEL)
    assert served is not None
    with service.connect() as connection:
        body = json.dumps({"model": MODEL, "input": [f"{n} " + "some words " * 30 for n in range(300)]}).encode()
        connection.sendall(service.raw_request(body))
        until(lambda: service.metric(f'unmask_waiting_tokens{{model="{MODEL}"}}') > 1000)
        with database.begin() as write:
            step(write, MODEL, "deprecated", actor="test", until=date(2100, 1, 1))
            step(write, MODEL, "retired", actor="test")
        until(lambda: MODEL not in listed(service))
        assert connection.recv(64).startswith(b"HTTP/1.1 200")


def test_weights_that_have_changed_do_not_answer(service: LocalService, database: Database, golden_dir: Path) -> None:
    go_live(database, golden_dir / "tiny_gemma", revision="0123456789abcdef")
    until(lambda: MODEL in listed(service))
    reply = embed(service)
    assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
    served = service.models.find(MODEL)
    assert served is not None and "run 'unmask onboard org/gemma' again" in served.reason


def test_a_restart_serves_what_is_live_and_not_what_is_retired(
    database: Database, tiny_llama: Path, golden_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_live(database, golden_dir / "tiny_gemma")
    go_live(database, tiny_llama, "org/old")
    with database.begin() as connection:
        step(connection, "org/old", "deprecated", actor="test", until=date(2100, 1, 1))
        step(connection, "org/old", "retired", actor="test")
    settings = ServeSettings(models=("org/old", str(tiny_llama)), warm=("org/old", str(tiny_llama)))
    models, sync = open_models(settings, database, threading.Event())
    assert [model.record.id for model in models.list()] == ["tiny_llama", MODEL] and sync is not None
    assert models.list()[1].source == str(golden_dir / "tiny_gemma")
    assert "org/old is retired and answers nobody" in caplog.text


def test_a_model_that_ships_as_live_elsewhere_passes_no_gate_here(database: Database, tiny_llama: Path) -> None:
    with database.begin() as connection:
        put_fields(connection, "org/gateless", {})
        for status in ("coming soon", "benchmarking", "staged", "live"):
            step(connection, "org/gateless", status, actor="test")
    models, _ = open_models(ServeSettings(models=(str(tiny_llama),)), database, threading.Event())
    assert models.find("org/gateless") is None  # nobody has said where its weights are


async def test_a_database_that_is_gone_changes_nothing(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.router.catalogue_sync._POLL_INTERVAL_S", 0.01)
    broken = Database(f"sqlite:///{tmp_path / 'empty.sqlite'}")  # without tables
    models = ModelRegistry([str(tiny_llama)])
    sync, polls = CatalogueSync(models, broken, 0), []
    poll = sync.poll

    async def counted() -> bool:
        polls.append(1)
        return await poll()

    monkeypatch.setattr(sync, "poll", counted)
    task = asyncio.create_task(sync.run())
    while len(polls) < 4:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.01)
    assert caplog.text.count("cannot be read") == 1 and not task.done()
    task.cancel()
    assert models.find("tiny_llama") is not None
    broken.close()
