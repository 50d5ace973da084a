"""A server whose model is computed by two replicas on Ray: the bits of one process, whoever is killed or frozen."""

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.api.live import LocalService, Reply, running, until
from tests.cluster import loaders
from tests.cluster.raylets import Raylets, raylets
from tests.engine import overload
from tests.web.conftest import HTML
from unmask.api import ServeSettings
from unmask.cluster import connection
from unmask.cluster import replicas as replicas_module
from unmask.cluster.connection import connected, connection_fault, import_ray, resources
from unmask.cluster.options import ReplicaOptions
from unmask.cluster.replicas import ReplicaHand, open_replicas
from unmask.encoder import LoadOptions
from unmask.encoder.encoder import Encoder
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.engine import Engine
from unmask.errors import ClusterError, MissingPackages, UsageError
from unmask.server import cluster_watch, serve
from unmask.web import website

FORWARDS = ("done", "late", "lost")
PATIENCE_S = 900  # of the tests on a busy machine; none waits for it


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A head with two processors, to which this process is connected."""
    with raylets(head_cpus=2) as started, connected(started.address):
        yield started


@pytest.fixture(scope="module")
def model(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to a model, which may be replaced."""
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "model").symlink_to(golden_dir / "tiny_llama", target_is_directory=True)
    return folder / "model"


@pytest.fixture(scope="module")
def service(cluster: Raylets, model: Path) -> Iterator[LocalService]:
    options = {"cluster": cluster.address, "replicas": "2", "replica_cpus": 0.5, "shutdown_grace_s": PATIENCE_S}
    with running(model, warm=(), build_pages=website, **options) as started:
        until(lambda: started.embed("a first text", {"prefer": "wait=30"}).status == 200, PATIENCE_S)
        yield started


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama", dtype="float32")


def engine_of(service: LocalService) -> Engine:
    return asyncio.run(service.models.list()[0].engine())


def hands_of(service: LocalService) -> list[ReplicaHand]:
    return [each.hand for each in engine_of(service)._hand_threads if isinstance(each.hand, ReplicaHand)]


def all_ready(service: LocalService) -> bool:
    return all(hand.state == "ready" for hand in engine_of(service).hands())


Calls = list[tuple[list[str], Future[np.ndarray]]]


def vectors(engine: Engine, texts: list[str], caller: str = "") -> np.ndarray:
    """Raw vectors, as a request gets them whose deadline allows for much."""

    async def run() -> np.ndarray:
        prompts = await engine.prepare(texts)
        return await engine.run(prompts, deadline=time.monotonic() + PATIENCE_S, caller=caller)

    return asyncio.run(run())


def load_on(service: LocalService, pool: ThreadPoolExecutor, count: int) -> Calls:
    """Send requests of one to four texts, no two alike."""
    engine = engine_of(service)
    texts = [[f"{number}.{i} of {time.monotonic_ns()}" for i in range(1 + number % 4)] for number in range(count)]
    return [(inputs, pool.submit(vectors, engine, inputs)) for inputs in texts]


def assert_answered(calls: Calls, encoder: Encoder) -> None:
    """All requests have the vectors of one process, to the bit."""
    for texts, call in calls:
        np.testing.assert_array_equal(call.result(), encoder.encode(texts))


def test_replicas_give_the_bits_of_one_process_and_are_seen(service: LocalService, encoder: Encoder) -> None:
    until(lambda: all_ready(service), PATIENCE_S)
    reply = service.embed(["a text by HTTP", "another"])
    np.testing.assert_allclose(
        reply.vectors, encoder.encode(["a text by HTTP", "another"], normalize=True), rtol=0, atol=1e-6
    )
    with ThreadPoolExecutor(8) as pool:
        calls = load_on(service, pool, 60)
        large = [f"{i} " + "many words of a long text " * (i % 20) for i in range(200)]
        assert_answered([*calls, (large, pool.submit(vectors, engine_of(service), large))], encoder)
    assert all(hand.forwards["done"] > 0 for hand in engine_of(service).hands())
    assert service.metric("unmask_replica_up{") == 2
    assert service.metric('unmask_replica_forwards{model="model",outcome="done"') >= 2
    assert service.call("GET", "/ready").status == 200


def test_the_status_page_has_a_table_of_replicas(service: LocalService) -> None:
    until(lambda: all_ready(service), PATIENCE_S)
    page = service.call("GET", "/status", headers=HTML).body.decode()
    [table] = re.findall(r">Replicas of model</h2>.*?</table>", page, re.DOTALL)
    header = ["Replica", "State", "Tokens per second", "Forwards", "Late", "Lost"]
    assert re.findall(r"<th scope=.col.[^>]*>(.*?)</th>", table) == header
    rows = re.findall(r"<tr><th [^>]*>(replica-\d+)</th>(.*?)</tr>", table)
    cells_of = {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}
    for hand in engine_of(service).hands():
        numbers = [int(hand.tokens_per_second or 0), *(hand.forwards[name] for name in FORWARDS)]
        assert cells_of[hand.name] == ["ready", *(f"{number:,}" for number in numbers)]
    assert set(cells_of) == {"replica-1", "replica-2"}


def test_a_single_text_is_not_behind_a_large_request(service: LocalService) -> None:
    engine, order = engine_of(service), list[str]()
    with ThreadPoolExecutor(2) as pool:
        texts = [f"{i} " + "some words " * 20 for i in range(800)]
        large = pool.submit(vectors, engine, texts, "an account")
        large.add_done_callback(lambda _: order.append("large"))
        until(lambda: engine.waiting_tokens() > 10_000, PATIENCE_S)
        vectors(engine, ["a single text"], "another account")
        order.append("single")
    assert order == ["single", "large"]
    assert large.result().shape == (800, engine.encoder.dim)


def test_nobody_notices_replicas_that_freeze_and_die(
    cluster: Raylets, service: LocalService, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "_SUSPECT_S", 2.0)
    until(lambda: all_ready(service), PATIENCE_S)
    frozen, killed = cluster.worker_ids("Replica")
    with ThreadPoolExecutor(8) as pool:
        calls = load_on(service, pool, 40)
        os.kill(frozen, signal.SIGSTOP)
        calls += load_on(service, pool, 40)
        # A canary every ten seconds notices a frozen replica that has no work.
        until(lambda: any(hand.state != "ready" for hand in engine_of(service).hands()), PATIENCE_S)
        calls += load_on(service, pool, 40)
        os.kill(killed, signal.SIGKILL)
        calls += load_on(service, pool, 40)
        assert_answered(calls, encoder)
    until(lambda: all_ready(service), PATIENCE_S)
    # Ray ends a process that does not answer only after a while.
    until(lambda: not {frozen, killed} & set(cluster.worker_ids("Replica")), PATIENCE_S)
    assert sum(hand.forwards["lost"] + hand.forwards["late"] for hand in engine_of(service).hands()) >= 1


def test_a_frozen_replica_that_wakes_is_used_again(cluster: Raylets, service: LocalService, encoder: Encoder) -> None:
    until(lambda: all_ready(service), PATIENCE_S)
    processes = cluster.worker_ids("Replica")
    with ThreadPoolExecutor(8) as pool:
        os.kill(processes[0], signal.SIGSTOP)
        calls = load_on(service, pool, 40)
        until(lambda: any(hand.state == "suspect" for hand in engine_of(service).hands()), PATIENCE_S)
        os.kill(processes[0], signal.SIGCONT)
        assert_answered(calls, encoder)
    until(lambda: all_ready(service), PATIENCE_S)
    assert cluster.worker_ids("Replica") == processes


def replace_files(model: Path, name: str) -> None:
    """Let the link show another revision, in a folder of this name."""
    other = model.with_name(name)
    shutil.copytree(model, other)
    [weights] = other.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + torch.full_like(tensor, 0.01) for name, tensor in tensors.items()}, weights)
    model.unlink()
    model.symlink_to(other, target_is_directory=True)


def test_a_new_revision_rolls_in_and_no_answer_mixes_two(
    cluster: Raylets, service: LocalService, model: Path, encoder: Encoder
) -> None:
    until(lambda: all_ready(service), PATIENCE_S)
    processes, old_space = set(cluster.worker_ids("Replica")), space_of(service)
    replace_files(model, "newer")
    newer, over = Encoder.load(model, dtype="float32"), Event()
    answers: list[tuple[list[str], Reply]] = []

    def send(number: int) -> None:
        while not over.is_set():
            texts = [f"{number}.{i} of {len(answers)} " * (1 + i % 5) for i in range(8)]
            answers.append((texts, service.embed(texts, {"request-deadline-ms": "600000"})))

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, number) for number in range(4)]
        service.loop.call_soon_threadsafe(service.models.renew)
        until(lambda: space_of(service) != old_space, PATIENCE_S)
        count = len(answers)
        until(lambda: len(answers) > count + 8 and all_ready(service), PATIENCE_S)
        over.set()
        for sender in senders:
            sender.result()
    spaces = {old_space: encoder, space_of(service): newer}
    for texts, reply in answers:
        assert reply.status == 200
        right = spaces[reply.headers["x-unmask-vector-space"]].encode(texts, normalize=True)
        np.testing.assert_allclose(reply.vectors, right, rtol=0, atol=1e-6)
    assert {reply.headers["x-unmask-vector-space"] for _, reply in answers} == set(spaces)
    until(lambda: not processes & set(cluster.worker_ids("Replica")), PATIENCE_S)
    assert len(cluster.worker_ids("Replica")) == 2


def space_of(service: LocalService) -> str:
    return service.call("GET", f"/v1/models/{service.model}").json["vector_space"]


def test_another_revision_is_refused_and_draining_loses_nothing(
    cluster: Raylets, service: LocalService, model: Path
) -> None:
    """The last test of this server: it stops it."""
    until(lambda: all_ready(service), PATIENCE_S)
    encoder = Encoder.load(model, dtype="float32")
    replace_files(model, "other")
    os.kill(cluster.worker_ids("Replica")[0], signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        calls = load_on(service, pool, 20)
        until(lambda: any(hand.problem for hand in hands_of(service)), PATIENCE_S)
        [problem] = [hand.problem for hand in hands_of(service) if hand.problem]
        revisions = r"has revision [0-9a-f]+, and \S+:\d+ [0-9a-f]+"
        assert re.fullmatch(rf"replica \S+:\d+ {revisions}; give all machines the same model", problem)
        assert_answered(calls, encoder)
        assert service.metric("unmask_replica_up{") == 1
        inputs = [f"{i} at the end" for i in range(500)]
        last = pool.submit(vectors, engine_of(service), inputs)
        until(lambda: engine_of(service).waiting_tokens() > 0, PATIENCE_S)
        service.server.stop()
        assert_answered([(inputs, last)], encoder)
    until(lambda: not cluster.worker_ids("Replica"), PATIENCE_S)


@pytest.fixture(scope="module")
def held_replicas(
    cluster: Raylets, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Path]]:
    """Engine of two replicas whose forwards can be held back, and the folder of their gate."""
    model, folder = golden_dir / "tiny_llama", tmp_path_factory.mktemp("gate")
    load = partial(loaders.held, model, folder, overload.PACK_TOKENS)
    encoder, group = open_replicas(str(model), LoadOptions(), load, ReplicaOptions(replicas="2", replica_cpus=0.5))
    engine = Engine(encoder, hands=group.hands)
    yield engine, folder
    (folder / "closed").unlink(missing_ok=True)
    engine.close()


@pytest.mark.parametrize("behaviour", ["refusal", "room", "shares"])
async def test_twice_the_load(held_replicas: tuple[Engine, Path], encoder: Encoder, behaviour: str) -> None:
    """As with one process, see `tests/engine/test_engine.py`."""
    engine, folder = held_replicas
    await overload.until(lambda: all(hand.state == "ready" for hand in engine.hands()))
    (folder / "closed").touch()
    release = (folder / "closed").unlink
    if behaviour == "refusal":
        right = encoder.forward_pack(await overload.prompts_of(engine))
        await overload.assert_half_is_refused_at_once(engine, release, right)
    elif behaviour == "room":
        await overload.assert_one_caller_leaves_room(engine, release)
    else:
        await overload.assert_equal_shares(engine, release)
    assert all(hand.forwards["late"] + hand.forwards["lost"] == 0 for hand in engine.hands())


@pytest.mark.parametrize(("dtype", "distance", "is_right"), [
    ("float32", 0.0, True), ("float32", 5e-6, True), ("float32", 2e-5, False), ("float16", 5e-5, True),
    ("float16", 2e-4, False), ("bfloat16", 5e-4, True), ("bfloat16", 2e-3, False), ("int8", 2e-3, False),
])  # fmt: skip
def test_a_canary_is_right_within_its_precision(
    held_replicas: tuple[Engine, Path], dtype: str, distance: float, is_right: bool
) -> None:
    [hand, _] = [each.hand for each in held_replicas[0]._hand_threads]
    assert isinstance(hand, ReplicaHand)
    group = copy(hand._replicas)
    assert group.first is not None
    right = group.first.canary / np.linalg.norm(group.first.canary)
    group.first = replace(group.first, dtype_choice=PrecisionChoice(dtype, ""))
    aside = np.eye(len(right), dtype=np.float32)[0] - right[0] * right
    angle = np.arccos(1 - distance)
    vector = 3 * (np.cos(angle) * right + np.sin(angle) * aside / np.linalg.norm(aside))
    assert group.is_right(vector) == is_right
    assert not group.is_right(np.full_like(vector, np.nan))


def test_a_server_ends_although_its_replica_finds_no_place(cluster: Raylets, golden_dir: Path) -> None:
    options = {"cluster": cluster.address, "replicas": "1", "replica_cpus": 3.0, "warm": ()}
    with running(golden_dir / "tiny_llama", **options) as service:
        assert service.embed("a text").error["code"] == "model_loading"
    assert service.loop.is_closed()


def test_a_question_to_a_silent_head_ends(cluster: Raylets, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits without end outlives its server, and Ray ends the whole process for it."""
    monkeypatch.setattr(connection, "_CONNECT_S", 0.5)
    ray = import_ray()
    with cluster.frozen_head():
        assert connection_fault(ray) == "its head does not answer"
        with pytest.raises(ClusterError, match=r"the head of the cluster does not answer in 0\.5 s: look whether"):
            resources(ray)
    until(lambda: connection_fault(ray) == "", PATIENCE_S)
    assert resources(ray).total["CPU"] == 2


def test_a_silent_head_keeps_nobody(cluster: Raylets) -> None:
    """In a process of its own, which ends as a command does: with actors that run and that are to be started."""
    script = """
import sys, time
from unmask.cluster import connection
from unmask.cluster.connection import connected, head_answers, kill_actor
class Actor:
    def place(self): return "here"
with connected(sys.argv[1]) as ray:
    remote = ray.remote(Actor).options(num_cpus=0.1, max_restarts=0)
    actor = remote.remote()
    print(ray.get(actor.place.remote()), flush=True)
    input()
    connection._CONNECT_S = 0.5
    print(head_answers(ray), flush=True)
    kill_actor(ray, remote.remote())
    kill_actor(ray, actor)
print("the end")
"""
    command = [sys.executable, "-c", script, cluster.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "here\n"
        with cluster.frozen_head():
            said, _ = process.communicate("go on\n")
        assert said == "False\nthe end\n"
    assert process.returncode == 0


def test_a_head_that_takes_connections_and_answers_nothing_is_said_at_once(cluster: Raylets) -> None:
    script = """
import sys
from unmask.cluster import connection
connection._CONNECT_S = 1.0
try:
    with connection.connected(sys.argv[1]):
        pass
except connection.ClusterError as error:
    print(error)
"""
    with cluster.frozen_head():
        command = [sys.executable, "-c", script, cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"no Ray cluster answers at {cluster.address} (it takes connections, and gives no")


def test_a_lost_head_is_said_and_another_one_is_used(
    cluster: Raylets, held_replicas: tuple[Engine, Path], golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this cluster: it ends it."""
    held_replicas[0].close()
    for name, seconds in (("_ASK_S", 0.1), ("_LOST_S", 0.2), ("_GRACE_S", 1.0)):
        monkeypatch.setattr(cluster_watch, name, seconds)
    both = tuple(str(golden_dir / name) for name in ("tiny_llama", "tiny_gemma"))  # the second one stays cold
    options = {"cluster": cluster.address, "replicas": "1", "replica_cpus": 0.5, "build_pages": website, "models": both}
    with raylets(head_cpus=1) as other, ExitStack() as stack:
        stack.callback(import_ray().shutdown)
        service = stack.enter_context(running(golden_dir / "tiny_llama", **options))
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(service.embed, [f"{i} " + "some words " * 30 for i in range(1000)])
            until(lambda: service.waiting_tokens() > 0, PATIENCE_S)
            cluster.kill_head()
            assert begun.result().status == 200 or is_lost(begun.result())
        until(lambda: is_lost(service.embed("a text", {"request-deadline-ms": "1000"})), PATIENCE_S)
        assert is_lost(service.embed("a text", model="tiny_gemma"))
        page = service.call("GET", "/status", headers=HTML).body.decode()
        assert "has lost its cluster" in page and "looked for" not in page
        assert service.metric("unmask_replica_up{") == service.waiting_tokens() == 0
        readiness = service.call("GET", "/ready")
        assert readiness.status == 503 and "is lost" in readiness.json["models"][service.model]
        assert service.watch is not None
        service.watch.address = other.address
        until(lambda: service.embed("a text", {"prefer": "wait=30"}).status == 200, PATIENCE_S)
        assert service.call("GET", "/ready").status == 200
        assert [served.state for served in service.models.list()] == ["ready", "cold"]


def is_lost(reply: Reply) -> bool:
    return reply.status == 503 and reply.error["code"] == "cluster_lost" and int(reply.headers["retry-after"]) > 0


def test_options_that_lack_their_companion(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="replicas='2': name their cluster too, such as --cluster local"):
        ServeSettings(replicas="2")
    with pytest.raises(UsageError, match="cluster='local': say how many replicas, such as --replicas 2"):
        ServeSettings(cluster="local")
    monkeypatch.setitem(sys.modules, "ray", None)
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    try:
        with pytest.raises(MissingPackages, match="--cluster needs packages that are not installed: pip install"):
            serve(ServeSettings(cluster="local", replicas="2", port=0))
    finally:  # it has set the log of this process
        root.setLevel(level)
        root.handlers[:] = handlers
