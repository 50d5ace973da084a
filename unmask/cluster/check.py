"""`unmask cluster check`: what a bulk job needs of a cluster, measured on every machine, with advice for each fault."""

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from unmask.bulk.storage import Store
from unmask.bulk.units import package_versions, probe_digest
from unmask.cluster.connection import alive_nodes, connected, kill_actor
from unmask.encoder.encoder import Encoder
from unmask.encoder.precision_choices import processor_name
from unmask.errors import ClusterError, UnmaskError

# An object is as large as the vectors of two units of the default model.
_CONTENT_BYTES = 32 * 2**20
_SLOW_BYTES_PER_S = 50e6


@dataclass(frozen=True)
class CheckRow:
    """A check of a machine.

    Attributes:
        machine: its host name and address, and the start of its number at Ray.
        check: name of the check.
        value: as measured.
        advice: what to do; empty if all is well.
    """

    machine: str
    check: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class _Facts:
    versions: dict[str, str]
    processor: str
    gpus: tuple[str, ...]
    token: bool


class Inspector:
    """An actor on a machine that is checked."""

    def facts(self) -> _Facts:
        """Return facts that need no model."""
        gpus = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        is_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        return _Facts(package_versions(), processor_name(), gpus, is_token)

    def receive(self, content: bytes) -> int:
        """Return the length of what was sent."""
        return len(content)

    def probe(self, load_encoder: Callable[[], Encoder]) -> str | UnmaskError:
        """Load the model and return the digest of its probe vectors."""
        try:
            return probe_digest(load_encoder())
        except UnmaskError as error:
            return error

    def storage(self, location: str, name: str, length: int) -> tuple[float, float] | UnmaskError:
        """Read an object that the checking process has written, and write and remove one; bytes/s of both."""
        try:
            store = Store(location)
            began = time.perf_counter()
            content = store.get(name)
            read = time.perf_counter() - began
            if content is None or len(content) != length:
                return ClusterError(f"{store.name} is another folder here; name one that all machines share, or a URL")
            began = time.perf_counter()
            own = f"{name}-{platform.node()}-{os.getpid()}"
            store.put(own, content)
            wrote = time.perf_counter() - began
            store.remove(own)
        except UnmaskError as error:
            return error
        return length / read, length / wrote


def check_cluster(
    address: str, load_encoder: Callable[[], Encoder], storage: str | None, wait: float
) -> list[CheckRow]:
    """Check every machine of a cluster that has processors.

    Args:
        load_encoder: of the model to encode with; called on each machine.
        storage: folder or URL that machines shall read and write; None to leave that out.
        wait: seconds that a machine may take for each answer.

    Raises:
        UsageError, ClusterError: as `connected`; or no machine has processors.
    """
    with connected(address) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in alive_nodes(ray) if node.resources_total.get("CPU", 0) > 0]
        if not nodes:
            raise ClusterError(f"the cluster at {address} has no machine with processors; start a node on one")
        remote = ray.remote(Inspector)
        inspectors = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.node_id.hex(), soft=False)
            actor = remote.options(num_cpus=0, max_restarts=0, scheduling_strategy=there).remote()
            place = f"{node.node_manager_hostname} ({node.node_manager_address})"
            machine = f"{place}, node {node.node_id.hex()[:8]}"
            inspectors[machine] = actor
        name, content = f".unmask-check-{secrets.token_hex(4)}", bytes(_CONTENT_BYTES)
        store = None if storage is None else Store(storage)
        if store is not None:
            store.put(name, content)
        try:
            checks = _Checks(ray, inspectors, wait)
            rows = [*checks.facts(), *checks.probes(load_encoder), *checks.bandwidths(content)]
            if storage is not None:
                rows += checks.storage(storage, name, len(content))
        finally:
            if store is not None:
                store.remove(name)
            for inspector in inspectors.values():
                kill_actor(ray, inspector)
    return sorted(rows, key=lambda row: row.machine)


class _Checks:
    def __init__(self, ray: Any, inspectors: dict[str, Any], wait: float) -> None:
        self._ray, self._inspectors, self._wait = ray, inspectors, wait

    def facts(self) -> Iterator[CheckRow]:
        """Yield versions, processors and the use of tokens."""
        own = package_versions()
        for machine, facts in self._answers("facts"):
            if isinstance(facts, str):
                yield CheckRow(machine, "answer", facts, "see Ray's logs there, or restart its node")
                continue
            others = {name: version for name, version in facts.versions.items() if version != own[name]}
            versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
            here = ", ".join(f"{name} {own[name]}" for name in others)
            yield CheckRow(machine, "versions", versions, f"install the same as here: {here}" if others else "")
            gpus = f", {len(facts.gpus)} x {facts.gpus[0]}" if facts.gpus else ""
            yield CheckRow(machine, "processor", facts.processor + gpus)
            advice = "whoever reaches the cluster can run programs on it; start it with RAY_AUTH_MODE=token"
            yield CheckRow(machine, "token", "required" if facts.token else "none", "" if facts.token else advice)

    def probes(self, load_encoder: Callable[[], Encoder]) -> Iterator[CheckRow]:
        """Yield the digests of the probe vectors; those of the first machine count as right."""
        first = None
        for machine, digest in self._answers("probe", load_encoder):
            if isinstance(digest, UnmaskError):
                yield CheckRow(machine, "model", "cannot be loaded", str(digest))
                continue
            first = first or digest
            advice = "another kind of processor: vectors may differ in their last bits, and --same-bits refuses it"
            yield CheckRow(machine, "probe", str(digest), "" if digest == first else advice)

    def bandwidths(self, content: bytes) -> Iterator[CheckRow]:
        """Yield the speed at which this process sends to each machine, one after the other."""
        for machine, inspector in self._inspectors.items():
            began = time.perf_counter()
            answer = self._answer(inspector.receive.remote(self._ray.put(content)))
            if isinstance(answer, int):
                yield _speed_row(machine, "from here", len(content) / (time.perf_counter() - began))

    def storage(self, location: str, name: str, length: int) -> Iterator[CheckRow]:
        """Yield the speeds at which each machine reads and writes an object."""
        for machine, inspector in self._inspectors.items():
            speeds = self._answer(inspector.storage.remote(location, name, length))
            if isinstance(speeds, tuple):
                yield _speed_row(machine, "storage, reading", speeds[0])
                yield _speed_row(machine, "storage, writing", speeds[1])
            else:
                yield CheckRow(machine, "storage", "cannot be used", str(speeds))

    def _answers(self, method: str, *arguments: Any) -> Iterator[tuple[str, Any]]:
        """Ask all machines at the same time; an answer is a sentence where there was none."""
        references = {
            machine: getattr(inspector, method).remote(*arguments) for machine, inspector in self._inspectors.items()
        }
        for machine, reference in references.items():
            yield machine, self._answer(reference)

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference, timeout=self._wait)
        except self._ray.exceptions.GetTimeoutError:
            return f"none in {self._wait:g} s"
        except self._ray.exceptions.RayError as error:
            return f"none: {type(error).__name__}"


def _speed_row(machine: str, check: str, bytes_per_s: float) -> CheckRow:
    is_slow = bytes_per_s < _SLOW_BYTES_PER_S
    advice = "slow: vectors may wait for it; write parts to a URL near the machines" if is_slow else ""
    return CheckRow(machine, check, f"{bytes_per_s / 1e6:,.0f} MB/s", advice)
