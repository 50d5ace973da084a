"""Ray clusters of several raylets on this machine, for tests. Everything listens on 127.0.0.1.

Ray gives its own processes 15 and 30 seconds to start, which a busy machine does not keep. So the ports of a raylet are
chosen here and written where it would wait for them, and its registration is awaited for longer.
"""

import inspect
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

# The only address for which all of Ray's processes listen on the loopback interface alone.
HOST = "127.0.0.1"
TOKEN = "0123456789abcdef" * 4
# Options of Ray's processes. The health checks wait longer than on a machine of its own.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",  # at its default of 15, workers get next to nothing of a busy machine
    "RAY_health_check_timeout_ms": "60000",
    "RAY_enable_metrics_collection": "0",
    # Without this, drivers take 127.0.0.1 for the machine's address in the network.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
os.environ.update(ENVIRONMENT)  # for good: Ray reads them when it is imported
_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_STORE_BYTES = 80 * 2**20
_START_S = 400.0


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind((HOST, 0))
        return opened.getsockname()[1]


class Raylets:
    """A running cluster: a head, without processors by default, and nodes with one each.

    Attributes:
        address: host and port of the head.
    """

    def __init__(self, folder: Path, head_cpus: int = 0) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self._cluster = Cluster()
        self._node(num_cpus=head_cpus, include_dashboard=False, no_monitor=True)
        self.address: str = self._cluster.address or ""

    def add(self) -> None:
        """Add a node with one processor."""
        self._node(num_cpus=1)

    def kill_machine_of(self, worker: int) -> None:
        """Kill the raylet that started a process, and all that it started, with SIGKILL."""
        raylet = psutil.Process(worker).ppid()
        node = next(n for n in self._cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
        self._cluster.remove_node(node, allow_graceful=False)

    @contextmanager
    def frozen_machine_of(self, worker: int) -> Iterator[None]:
        """Stop the raylet that started a process, and all that it started, with SIGSTOP, until the block ends."""
        raylet = psutil.Process(worker).parent()
        assert raylet is not None
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    @contextmanager
    def frozen_head(self) -> Iterator[None]:
        """Stop the head's server with SIGSTOP until the block ends: it takes connections, and answers nothing.

        It is woken after two minutes at the latest, for a block that waits without end.
        """
        head = self._cluster.head_node
        assert head is not None
        server = psutil.Process(head.all_processes["gcs_server"][0].process.pid)
        waker = threading.Timer(120, server.resume)
        server.suspend()
        waker.start()
        try:
            yield
        finally:
            waker.cancel()
            server.resume()

    def kill_head(self) -> None:
        """Kill the head with SIGKILL. The cluster is of no further use."""
        head = self._cluster.head_node
        assert head is not None
        for name in ("gcs_server", "raylet"):
            head.all_processes[name][0].process.kill()

    def worker_ids(self, name: str) -> list[int]:
        """Process ids of this cluster's actors of a class."""
        ids = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                parent = process.parent()
                is_ours = parent is not None and str(self._folder) in " ".join(parent.cmdline())
                if is_ours and f"ray::{name}" in " ".join(process.cmdline()):
                    ids.append(process.pid)
        return ids

    def stop(self) -> None:
        """End all processes of the cluster."""
        self._cluster.shutdown()

    def _node(self, **options: Any) -> None:
        common = {"node_ip_address": HOST, "object_store_memory": _STORE_BYTES, "include_log_monitor": False}
        with patience():
            self._cluster.add_node(temp_dir=str(self._folder), **common, **options)


@contextmanager
def patience() -> Iterator[None]:
    """Let Ray take its time to start a node."""
    from ray._private import services, utils

    start_raylet, get_node = services.start_raylet, services.get_node

    def start(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(start_raylet).bind(*arguments, **options)
        for name in _PORTS:
            bound.arguments[name] = _free_port()
            file = Path(bound.arguments["session_dir"]) / f"{name}_{bound.arguments['node_id']}"
            file.write_text(str(bound.arguments[name]), encoding="utf-8")
        return start_raylet(*bound.args, **bound.kwargs)

    def registered(*arguments: Any) -> Any:
        end = time.monotonic() + _START_S
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    with (
        mock.patch.object(services, "start_raylet", start),
        mock.patch.object(services, "get_node", registered),
        # The cluster is not to be anybody's `auto`.
        mock.patch.object(utils, "write_ray_address", lambda *_: None),
    ):
        yield


@contextmanager
def raylets(head_cpus: int = 0) -> Iterator[Raylets]:
    """Start a head in a folder of its own; end everything and remove the folder at the end."""
    # Not pytest's folder: the path of a Unix socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="unmask-ray-"))
    cluster = None
    try:
        cluster = Raylets(folder, head_cpus)
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
