"""Names of clusters, numbers and sizes of workers and replicas. This module imports neither ray nor torch."""

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from unmask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """A cluster, and the workers that a job or a run may have on it.

    Attributes:
        cluster: Work on a Ray cluster: auto (RAY_ADDRESS, or the cluster of this machine), HOST:PORT of its head, or
            local, which starts one here.
        workers: Number of workers, each a process. Encoding also takes LEAST:MOST. Default for encoding: from
            1 up to as many as fit into the cluster; for training: 1.
        worker_cpus: Processors of a worker.
        worker_gpus: GPUs of a worker. Its model needs the device cuda.
        worker_wait: Seconds that the cluster may take to start the first worker, or all of a training run. An
            autoscaler may have to start machines.
    """

    cluster: str | None = None
    workers: str | None = None
    worker_cpus: float = 1.0
    worker_gpus: float = 0.0
    worker_wait: float = 300.0

    def __post_init__(self) -> None:
        self.limits()
        if self.cluster is not None:
            require_address(self.cluster)
        for name in ("worker_cpus", "worker_gpus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name):g}: give 0 or more")
        if not 0 < self.worker_wait < math.inf:
            raise UsageError(f"--worker-wait {self.worker_wait:g}: give a number of seconds above 0")

    def limits(self) -> tuple[int, int | None]:
        """Return the least and the most workers; None for as many as fit.

        >>> ClusterOptions(workers="4:64").limits()
        (4, 64)

        Raises:
            UsageError: `workers` is neither N nor LEAST:MOST.
        """
        if self.workers is None:
            return 1, None
        return _limits("--workers", self.workers)


def _limits(option: str, text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    try:
        limits = int(least), int(most) if colon else int(least)
    except ValueError:
        limits = 0, 0
    if not 1 <= limits[0] <= limits[1]:
        raise UsageError(f"{option} {text}: give a number, or LEAST:MOST as in 4:64, from 1 on")
    return limits


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Number and size of the replicas of a model.

    Attributes:
        replicas: number of processes that compute for a model, or LEAST:MOST.
        replica_cpus, replica_gpus: processors and GPUs of each.
        replica_wait: seconds that the cluster may take to start the first one.
    """

    replicas: str = "1"
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    replica_wait: float = 300.0

    def limits(self) -> tuple[int, int]:
        """Return the least and the most replicas.

        Raises:
            UsageError: `replicas` is neither N nor LEAST:MOST.
        """
        return _limits("--replicas", self.replicas)


def require_address(address: str, option: str = "--cluster") -> None:
    """Refuse an address that is none of a cluster.

    Args:
        option: where the address was given.

    Raises:
        UsageError: it is neither auto, local nor HOST:PORT. One that takes jobs is answered with the command that sends
            the job there.
    """
    if address in ("auto", "local"):
        return
    parts = urlsplit(address) if "://" in address else None
    if parts is not None and parts.scheme in ("http", "https"):
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise UsageError(
            f"{option} {place} takes jobs and starts no workers; send the whole command there: "
            f"ray job submit --address {place} -- unmask ... --cluster auto"
        )
    host, _, port = address.rpartition(":")
    if parts is not None or not host or not port.isdigit():
        raise UsageError(
            f"{option} {address}: give auto, local, or HOST:PORT of the cluster's head (its port is 6379 by default)"
        )
