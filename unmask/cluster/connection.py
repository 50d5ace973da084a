"""Connections to a Ray cluster. What goes wrong is one sentence."""

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unmask.cluster.options import require_address
from unmask.errors import ClusterError, MissingPackages, UsageError

_CONNECT_S = 10.0
# Set while this process takes leave of a cluster, at its end or the cluster's, so that nobody waits for it any longer.
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
    # A call that comes after the end of a connection would start a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
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
        ray.shutdown()
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


def _connect(ray: Any, address: str, folder: str | None) -> None:
    """Connect to a cluster, or start one whose files are in a folder."""
    try:
        if folder is not None:
            _start_local(ray, folder, _QUIET)
        else:
            ray.init(address=address, **_require_answer(address), **_QUIET)
    except UsageError:
        raise
    except Exception as error:  # Ray raises Exception itself, among many others
        raise _sentence(address, error) from error


def head_answers(ray: Any) -> bool:
    """True if the head of the cluster that this process is connected to takes connections."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def connection_fault(ray: Any) -> str:
    """Return why the cluster that this process is connected to is of no use; empty if it is."""
    if not head_answers(ray):
        return "its head does not answer"
    own = ray.get_runtime_context().get_node_id()
    is_alive = any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())
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


def _require_answer(address: str) -> dict[str, str]:
    """Fail early where nobody listens, since Ray itself tries for a minute; return options for the connection."""
    if address == "auto":
        return {}
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
        pass
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
