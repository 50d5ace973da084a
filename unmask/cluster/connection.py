"""Connections to a Ray cluster. What goes wrong is one sentence."""

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from unmask.cluster.options import require_address
from unmask.errors import ClusterError, MissingPackages, UsageError

_CONNECT_S = 10.0
# Seconds that ending an actor may take. Without its head, Ray would wait for ever.
_KILL_S = 2.0
# Seconds after which Ray ends a process that has lost its head node; 60 by default. This number lets the process live
# on, and report the loss itself.
_RECONNECT_S = 10**6
# Set while this process leaves a cluster, because the process or the cluster ends. Waiting calls give up then.
LOST = threading.Event()
_QUIET = {"namespace": "unmask", "log_to_driver": False, "logging_level": logging.CRITICAL}
_LOCAL_STORE_BYTES = 512 * 2**20
_ON_A_MACHINE = (
    "run the command on a machine of the cluster, or send it there: "
    "ray job submit --address http://HEAD:8265 -- unmask ... --cluster auto"
)


def import_ray(loopback: bool = False) -> Any:
    """Return the module ray.

    Args:
        loopback: a cluster on 127.0.0.1 is started or joined, and no other.

    Raises:
        MissingPackages: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints a page on stdout, where vectors may go, for every worker that dies. It is said here in a sentence.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    # Otherwise, a call after the end of the connection would start a new cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_RECONNECT_S))
    if loopback:
        # Ray would take the machine's address in the network instead, and listen on all of its interfaces.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise MissingPackages("--cluster needs", "ray") from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect this process to a cluster; yields the module ray.

    A process that is connected already stays so.

    Args:
        address: auto, local or HOST:PORT. auto is what RAY_ADDRESS names, else the cluster of this machine.

    Raises:
        UsageError: the address is of another form.
        ClusterError: no cluster answers, it refuses, or it has another version.
    """
    require_address(address)
    named = os.environ.get("RAY_ADDRESS", "")
    if address == "auto" and named:
        require_address(named, "RAY_ADDRESS")
        address = named
    ray = import_ray(loopback=address == "local")
    if ray.is_initialized():
        yield ray
        return
    folder = tempfile.mkdtemp(prefix="unmask-ray-") if address == "local" else None
    try:
        _connect(ray, address, folder)
        yield ray
    finally:
        disconnect(ray)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def reconnect(address: str) -> None:
    """Connect this process again, from any thread, after the head of its cluster was lost; a no-op if it is connected.

    Args:
        address: as for `connected`, but not local: such a cluster ends with its head.

    Raises:
        ClusterError: as for `connected`.
    """
    ray = import_ray()
    named = os.environ.get("RAY_ADDRESS", "")
    if not ray.is_initialized():
        _connect(ray, named if address == "auto" and named else address, None)


def disconnect(ray: Any) -> None:
    """End this process's connection, also if the head does not answer.

    Ray's `shutdown` waits for the head to end two subscriptions, without a time limit. Nothing is lost with them: what
    goes wrong is said here, not by Ray.
    """
    worker = ray._private.worker.global_worker
    worker.threads_stopped.set()
    for name in ("gcs_error_subscriber", "gcs_log_subscriber"):
        subscriber = vars(worker).get(name)
        if subscriber is not None and not end_within(_KILL_S, subscriber.close):
            setattr(worker, name, _LostSubscriber())
            vars(worker).pop("listener_thread", None)  # it waits for the subscription
    ray.shutdown()


class _LostSubscriber:
    """Stand-in for a subscription that the head does not end."""

    def close(self) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Raise the error at which Ray's thread ends."""
        raise ConnectionError


def kill_actor(ray: Any, actor: Any) -> None:
    """End an actor, and do not wait for a head that does not answer."""
    end_within(_KILL_S, ray.kill, actor)


def end_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> bool:
    """Call a function that may wait without end; return whether it has ended in time.

    One that has not goes on in a thread that the end of the process does not wait for.

    Raises:
        Exception: what the function has raised in time.
    """
    errors: list[Exception] = []

    def call() -> None:
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _connect(ray: Any, address: str, folder: str | None) -> None:
    """Connect to a cluster, or start one whose files are in a folder."""
    try:
        if folder is not None:
            _start_local(ray, folder, _QUIET)
        else:
            ray.init(address=address, **_require_answer(ray, address), **_QUIET)
    except UsageError:
        raise
    except Exception as error:  # Ray raises Exception itself, among many others
        raise _sentence(address, error) from error


@dataclass(frozen=True)
class Resources:
    """Processors, GPUs and the like of a cluster, by Ray's names.

    Attributes:
        total: of all machines.
        free: what no actor holds.
    """

    total: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{self.free.get(x, 0):g} of {self.total.get(x, 0):g} {x}s free" for x in ("CPU", "GPU"))


def alive_nodes(ray: Any) -> list[Any]:
    """Return Ray's description (`GcsNodeInfo`) of each node that is alive.

    Ray's own `nodes` and `cluster_resources` wait without end for a head that is gone, and so does everybody who waits
    for them. Its client of the head takes a time limit.

    Raises:
        ClusterError: the head does not answer.
    """
    nodes = _ask_head(ray, "get_all_node_info").values()
    return [node for node in nodes if node.state == node.ALIVE]


def resources(ray: Any) -> Resources:
    """Return the resources of the cluster that this process is connected to.

    Raises:
        ClusterError: the head does not answer.
    """
    total, free = defaultdict[str, float](float), defaultdict[str, float](float)
    for node in alive_nodes(ray):
        for name, amount in node.resources_total.items():
            total[name] += amount
    for usage in _ask_head(ray, "get_all_resource_usage").resource_usage_data.batch:
        for name, amount in usage.resources_available.items():
            free[name] += amount
    return Resources(total, free)


def _ask_head(ray: Any, question: str, *arguments: Any) -> Any:
    try:
        return getattr(ray._private.worker.global_worker.gcs_client, question)(*arguments, timeout=_CONNECT_S)
    except ray.exceptions.RpcError as error:
        raise ClusterError(
            f"the head of the cluster does not answer in {_CONNECT_S:g} s: look whether it runs, and try again"
        ) from error


def head_answers(ray: Any) -> bool:
    """True if the head of the cluster that this process is connected to takes connections and answers."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            pass
        _ask_head(ray, "check_alive", [])
    except (OSError, ClusterError):
        return False
    return True


def connection_fault(ray: Any) -> str:
    """Return why the cluster that this process is connected to is of no use; empty if it is."""
    if not head_answers(ray):
        return "its head does not answer"
    own = bytes.fromhex(ray.get_runtime_context().get_node_id())
    try:
        is_alive = any(node.node_id == own for node in alive_nodes(ray))
    except ClusterError:
        return "its head does not answer"
    return "" if is_alive else "Ray's process on this machine is gone"


def _start_local(ray: Any, folder: str, quiet: dict[str, Any]) -> None:
    """Start a cluster of this machine alone. Only who has its token may use it."""
    # Ray asks for tokens here by itself, as long as RAY_AUTH_MODE is not set.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_LOCAL_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
        **quiet,
    )


def _require_answer(ray: Any, address: str) -> dict[str, str]:
    """Fail early where nobody answers, since Ray itself tries for minutes; return options for the connection."""
    if address == "auto":
        return {}
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
        pass

    def ask() -> None:
        with suppress(Exception):  # a refusal is an answer, and is said when this process connects
            ray._raylet.GcsClient(address=f"{host}:{port}").check_alive([], timeout=_CONNECT_S)

    if not end_within(_CONNECT_S, ask):
        raise TimeoutError(f"it takes connections, and gives no answer in {_CONNECT_S:g} s")
    # Ray would take this machine's address in the network, where a cluster on a loopback address does not listen.
    return {"_node_ip_address": host} if host == "127.0.0.1" else {}


def _sentence(address: str, error: Exception) -> ClusterError:
    """Return an error that says what Ray's error means."""
    text = " ".join(str(error).split())
    causes = f"{text} {error.__cause__}"
    if address == "local":
        return ClusterError(
            f"Ray does not start on this machine ({_first(text)}); it gives itself 30 s, which a busy machine may not "
            "keep: run the same command again, or leave out --cluster"
        )
    versions = re.search(r"cluster was started with: (.*?) This process.*? started with: (.*?)\.? *$", text)
    if "ersion mismatch" in text:
        detail = f": the cluster has {versions[1]}, this process {versions[2]}" if versions else ""
        return ClusterError(f"the cluster at {address} has another version of Ray or Python{detail}; install the same")
    if re.search(r"authenticat|auth.?token", causes, re.IGNORECASE):
        return ClusterError(
            f"the cluster at {address} refuses this process's token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the "
            "cluster's, and RAY_AUTH_MODE=token"
        )
    if isinstance(error, OSError):
        where = "on this machine" if address == "auto" else f"at {address}"
        return ClusterError(f"no Ray cluster answers {where} ({error.strerror or _first(text)}); {_ON_A_MACHINE}")
    return ClusterError(f"the cluster at {address} cannot be used: {_first(text)}; {_ON_A_MACHINE}")


def _first(text: str) -> str:
    return text.partition(". ")[0][:200]
