"""Connections that fail, without a cluster: each says in one sentence what to do."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

import tests.cluster.raylets  # before ray
from unmask.api import ServeSettings
from unmask.cli import main
from unmask.cluster import connection
from unmask.cluster.connection import connected, end_within
from unmask.cluster.options import ClusterOptions
from unmask.errors import ClusterError, UsageError

ROOT = Path(__file__).parent.parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_an_address_where_nobody_listens() -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{opened.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=rf"no Ray cluster answers at {address} \(Connection refused\); run the"),
            connected(address),
        ):
            pass


def test_a_call_that_does_not_end_is_left_and_one_that_fails_raises() -> None:
    event = Event()
    assert not end_within(0.01, event.wait) and end_within(60, event.set)
    with pytest.raises(ValueError, match="no number"):
        end_within(60, int, "no number")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", ""])
def test_addresses_of_another_form(address: str) -> None:
    with pytest.raises(UsageError, match=rf"--cluster {address}: give auto, local, or HOST:PORT"):
        ClusterOptions(cluster=address)
    with pytest.raises(UsageError, match="give auto, local, or HOST:PORT"), connected(address):
        pass


def test_an_address_that_takes_jobs_is_answered_with_the_command_that_sends_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = "takes jobs and starts no workers; send the whole command there: ray job submit --address"
    with pytest.raises(SystemExit) as ended:
        main(["encode", "in.txt", "-o", f"{tmp_path}/out.npy", "--cluster", "https://user:secret@head:8265/jobs"])
    assert ended.value.code == 1
    place = "https://head:8265"
    said = f"unmask: --cluster {place} {advice} {place} -- unmask ... --cluster auto\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")  # where Ray's own client for jobs reads it
    with pytest.raises(UsageError, match=f"^RAY_ADDRESS http://head:8265 {advice}"), connected("auto"):
        pass


def test_another_version_of_ray_is_named() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info(
            {"ray_version": "2.1.0", "python_version": "3.11.0"}, "this process", python_version_match_level="minor"
        )
    sentence = str(connection._sentence("head:6379", raised.value))
    assert "\n" not in sentence
    assert sentence.startswith(
        "the cluster at head:6379 has another version of Ray or Python: the cluster has Ray: 2.1.0"
    )


@pytest.mark.parametrize("workers", ["0", "4:2", "a", "1:2:3", ""])
def test_numbers_of_workers_that_are_none(workers: str) -> None:
    with pytest.raises(UsageError, match=r"--workers .*: give a number, or LEAST:MOST"):
        ClusterOptions(workers=workers)
    with pytest.raises(UsageError, match=r"--replicas .*: give a number, or LEAST:MOST"):
        ServeSettings(cluster="local", replicas=workers)


def test_without_ray_the_option_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a text\n")
    script = "import sys; sys.modules['ray'] = None; from unmask.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "encode", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy")]
    refusal = subprocess.run([*command, "--cluster", "local"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert refusal.returncode == 1
    assert "unmask: --cluster needs packages that are not installed: pip install" in refusal.stderr
    assert not (tmp_path / "out.npy").exists()


def test_ray_is_imported_in_functions_of_one_package_alone() -> None:
    """So that everything else can be used where it is not installed."""
    places: list[tuple[str, bool]] = []
    for file in (ROOT / "unmask").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if not re.search(r"^\s*(import|from) ray\b", text, re.MULTILINE):
            continue
        tree = ast.parse(text)
        inside = {id(node) for outer in ast.walk(tree) if isinstance(outer, FUNCTIONS) for node in ast.walk(outer)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.partition(".")[0] == "ray" for name in names):
                places.append((file.parent.name, id(node) in inside))
    assert set(places) == {("cluster", True)}


_LISTENING = """
import json, os, psutil
from unmask.cluster.connection import connected, end_within
with connected("local"):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    print(json.dumps([[s.laddr.ip, s.laddr.port] for s in sockets if s.status == psutil.CONN_LISTEN]))
"""


def test_a_cluster_of_this_machine_alone_listens_on_the_loopback_interface_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in tests.cluster.raylets.ENVIRONMENT}
    command = [sys.executable, "-c", _LISTENING]
    started = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert started.returncode == 0, started.stderr
    addresses = {address.removeprefix("::ffff:") for address, _ in json.loads(started.stdout)}
    assert addresses == {"127.0.0.1"}
