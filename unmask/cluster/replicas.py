"""Replicas of a model for an engine: actors that compute packs. Queue, keys and money stay where the engine is.

Ray places a replica and carries its calls; it neither restarts one nor repeats a call. It takes 14 s to notice that a
machine is lost, and a minute if it hangs, which is longer than a request may take. So each hand has a clock of its own:
a replica that is late is suspect until its canary is right, and is replaced if that takes too long.
"""

import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np

from unmask.bulk.units import package_versions, probe_digest, probe_texts
from unmask.checkpoint import open_checkpoint
from unmask.cluster.agreement import require_equal_models, require_equal_versions
from unmask.cluster.connection import LOST, head_answers, import_ray, kill_actor, resources
from unmask.cluster.options import ReplicaOptions
from unmask.conformance.references import FLOORS, PRECISION_CLASSES, distances
from unmask.encoder import Dtype, Encoder, LoadOptions, Prompt
from unmask.encoder.loading import prompts_for
from unmask.encoder.packing import pack_budget, parallel_packs
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.encoder.prompts import PromptBuilder
from unmask.encoder.remote_encoder import RemoteEncoder
from unmask.encoder.runtime.threads import num_threads
from unmask.engine.hand import PACK_TOKENS, HandLost, HandState, LocalHand, PackVectors
from unmask.errors import ClusterError, EngineError, UnmaskError

log = logging.getLogger("unmask")

_TICK_S, _POLL_S = 0.5, 0.05
# Seconds that a suspect has for its canary before it is replaced. Its process may have stopped for good.
_SUSPECT_S = 20.0
# Seconds before a replica is started again that could not load, or gave a wrong canary.
_RETRY_S = 30.0
# Greatest distance of a canary in the coarser precisions. Their limits to float32 are wider, but replicas of one
# precision and one kind of processor round alike.
_MAX_CANARY_DISTANCE = 1e-3

# Token ids of all prompts end to end, int32; per prompt its length and pooled span, int32 [n, 3]; prompts per pack.
_Packs = tuple[np.ndarray, np.ndarray, list[int]]


@dataclass(frozen=True)
class ReplicaDescription:
    """A loaded replica.

    Attributes:
        place: host and process.
        versions: see `package_versions`.
        model: what all replicas must have in common, by name.
        tokens_digest: of its own token ids for a few texts.
        canary: raw vector of the canary text, [dim].
        num_parameters, device: of its model.
        dtype_choice: the precision it was loaded in.
        threads: number of packs that it computes at the same time.
        tokens_per_second: speed with the probe texts.
    """

    place: str
    versions: dict[str, str]
    model: dict[str, Any]
    tokens_digest: str
    canary: np.ndarray
    num_parameters: int
    device: str
    dtype_choice: PrecisionChoice
    threads: int
    tokens_per_second: float


class Replica:
    """An actor that computes packs. Errors are returned and not raised, for Ray would wrap them."""

    def __init__(self, load_encoder: Callable[[], Encoder]) -> None:
        self._load_encoder = load_encoder

    def place(self) -> str:
        """Return host and process."""
        return f"{platform.node()}:{os.getpid()}"

    def load(self) -> ReplicaDescription | UnmaskError:
        """Load the model."""
        try:
            encoder = self._load_encoder()
            probe = probe_digest(encoder)
            revision = encoder.checkpoint.revision
        except UnmaskError as error:
            return ClusterError(f"replica {self.place()}: {error}")
        self._hand = LocalHand(encoder)
        prompts = encoder.prompts.build(probe_texts())
        began = time.perf_counter()
        encoder.encode_prompts(prompts)
        seconds = time.perf_counter() - began
        return ReplicaDescription(
            place=self.place(),
            versions=package_versions(),
            model={
                "revision": revision,
                "precision": encoder.precision,
                "pooling": encoder.pooling,
                "max_length": encoder.max_length,
                "dim": encoder.dim,
                "probe": probe,
            },
            tokens_digest=_tokens_digest(encoder.prompts),
            canary=encoder.encode_prompts(prompts[:1])[0],
            num_parameters=encoder.num_parameters,
            device=encoder.device.type,
            dtype_choice=encoder.dtype_choice,
            threads=num_threads(),
            tokens_per_second=sum(len(prompt.ids) for prompt in prompts) / max(seconds, 1e-6),
        )

    def forward(self, packs: _Packs) -> tuple[list[PackVectors], int]:
        """Compute packs; return their outcomes, and the most tokens that a pack may have from now on."""
        prompts = _unpacked(packs)
        outcomes: dict[int, PackVectors] = {}
        self._hand.forward(prompts, float("inf"), outcomes.__setitem__)
        return [outcomes[number] for number in range(len(prompts))], self._hand.pack_tokens


class Replicas:
    """The replicas of one model: what they have in common, and their hands.

    Args:
        ray: the module, connected.
        load_encoder: called in each replica, so it must be picklable.
        tokens_digest: of this process's token ids, see `ReplicaDescription`.
        canary: prompt whose vector shows that a replica is right.
        options: number and size.
    """

    def __init__(
        self,
        ray: Any,
        load_encoder: Callable[[], Encoder],
        tokens_digest: str,
        canary: Prompt,
        options: ReplicaOptions,
    ) -> None:
        remote = ray.remote(Replica).options(
            num_cpus=options.replica_cpus, num_gpus=options.replica_gpus, max_restarts=0, max_task_retries=0
        )
        self.new_actor: Callable[[], Any] = lambda: remote.remote(load_encoder)
        self.ray, self.canary = ray, canary
        self._tokens_digest = tokens_digest
        self._lock = threading.Lock()
        self.first: ReplicaDescription | None = None
        self.least, most = options.limits()
        self.hands = [ReplicaHand(self, f"replica-{number}") for number in range(1, most + 1)]

    def agree(self, replica: ReplicaDescription) -> None:
        """Compare a replica with this process and with the first one.

        Raises:
            ClusterError: they differ, so that answers would be mixed.
        """
        name = f"replica {replica.place}"
        require_equal_versions(name, replica.versions)
        if replica.tokens_digest != self._tokens_digest:
            raise ClusterError(
                f"{name} reads texts as other tokens than this process; give all machines the same files of the model"
            )
        with self._lock:
            first = self.first = self.first or replica
        require_equal_models(name, replica.model, first.place, first.model, _ADVICE)

    def is_right(self, vector: np.ndarray) -> bool:
        """Return true if a vector is the canary's, within the limit of the precision."""
        assert self.first is not None
        precision = PRECISION_CLASSES[cast(Dtype, self.first.dtype_choice.dtype)]
        limit = min(FLOORS[precision][0], _MAX_CANARY_DISTANCE)
        return bool(distances(vector[None], self.first.canary[None])[0] <= limit)

    def vectors(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return raw vectors by a replica that is ready, float32 [n, dim].

        Raises:
            ClusterError: it gave no answer.
            EngineError: the model failed.
        """
        hand = next(hand for hand in self.hands if hand.state == "ready")
        outcomes: list[PackVectors] = []
        try:
            hand.forward([prompts], _SUSPECT_S, lambda _, outcome: outcomes.append(outcome))
        except HandLost as lost:
            raise ClusterError(f"{hand.name} gave no answer after it was loaded; see Ray's logs") from lost
        for error in outcomes[0].errors.values():
            raise error
        return outcomes[0].vectors

    def close(self) -> None:
        """End all replicas."""
        for hand in self.hands:
            hand.close()

    def wait_for_one(self, seconds: float) -> None:
        """Start the replicas that are always used, and wait until one is ready.

        Raises:
            ClusterError: none found a place in time, or one may not take part.
        """
        end = time.monotonic() + seconds
        used = self.hands[: self.least]
        for hand in used:
            hand.start()
        while not any(hand.restore(wait_s=0) for hand in used):
            time.sleep(_POLL_S)
            if LOST.is_set():
                raise ClusterError("this process takes leave of the cluster, and a replica still loads the model")
            if problem := next((hand.problem for hand in used if hand.problem), ""):
                raise ClusterError(problem)
            if time.monotonic() > end and not any(hand.has_place() for hand in used):
                raise ClusterError(f"the cluster started no replica in {seconds:g} s: {self.room()}")

    def room(self) -> str:
        """Describe the free processors and GPUs of the cluster, and what to do."""
        return f"it has {resources(self.ray)}; end other work there, add machines, or lower --replica-cpus"


_ADVICE = {
    "precision": "name a precision with --dtype",
    "probe": "it is another kind of processor, whose vectors differ in their last bits: use machines of one kind",
}


class ReplicaHand:
    """A hand that is an actor, and the next one when that is lost. One thread uses it.

    Attributes:
        name, state, tokens_per_second: see `Hand`.
        problem: why no replica can be started; empty if one can, or it is not known.
        place: host and process of the last replica that was ready.
    """

    def __init__(self, replicas: Replicas, name: str) -> None:
        self._replicas, self.name = replicas, name
        self.state: HandState = "starting"
        self.tokens_per_second: float | None = None
        self.problem, self.place = "", ""
        self._actor: Any = None
        self._place: Any = None  # Ray's reference of where it is, which is answered before the model is loaded
        self._answer: Any = None  # reference of the description or the canary that is awaited
        self._since = 0.0  # time at which that was asked for, or after which a replica may be started
        self._is_asked = False  # the canary was asked for
        self._late: tuple[Any, Callable[[int, PackVectors], None]] | None = None
        self._pack_tokens, self._threads, self._device = PACK_TOKENS, 1, "cpu"
        self._is_closed = False

    def sizes(self, waiting: int) -> tuple[int, int]:
        """Return number and tokens of packs for the replica's cores or device; see `Hand`."""
        count = parallel_packs(waiting, self._device, self._threads)
        return count, min(self._pack_tokens, pack_budget(waiting, self._device, self._threads))

    def forward(
        self, packs: Sequence[Sequence[Prompt]], limit_s: float, deliver: Callable[[int, PackVectors], None]
    ) -> None:
        """Send packs to the replica, and wait; see `Hand`."""
        ray = self._replicas.ray
        reference = self._actor.forward.remote(_packed(packs))
        end = time.monotonic() + limit_s
        try:
            outcomes, self._pack_tokens = self._wait_for(reference, end)
        except ray.exceptions.GetTimeoutError:
            if self._is_closed:
                raise HandLost(is_late=True) from None
            log.warning("%s is late: its work goes to others until its canary is right", self.name)
            self._late = reference, deliver
            self._ask_canary()
            self.state = "suspect"
            raise HandLost(is_late=True) from None
        except ray.exceptions.RayTaskError as error:
            log.error("%s failed on %d packs: %s", self.name, len(packs), type(error.cause).__name__)
            raise EngineError("the model failed on this request") from error
        except ray.exceptions.RayError as error:
            log.warning("%s ended (%s) and is started again", self.name, type(error).__name__)
            self._end()
            raise HandLost(is_late=False) from error
        for number, outcome in enumerate(outcomes):
            deliver(number, outcome)

    def _wait_for(self, reference: Any, end: float) -> tuple[list[PackVectors], int]:
        """Return the answer of a forward. A hand that is closed waits no longer: nobody may ask Ray after its end."""
        ray = self._replicas.ray
        while True:
            left = end - time.monotonic()
            try:
                return ray.get(reference, timeout=max(0.0, min(left, _TICK_S)))
            except ray.exceptions.GetTimeoutError:
                if left <= _TICK_S or self._is_closed:
                    raise

    def restore(self, wait_s: float = _TICK_S) -> bool:
        """Return true if the replica can compute. Otherwise start it, or wait a moment for its answer; see `Hand`."""
        if self.state == "ready" and not self._is_asked:
            return True
        self.start()
        if self._actor is None:
            time.sleep(wait_s)
            return False
        ray = self._replicas.ray
        ready, _ = ray.wait([self._answer], timeout=wait_s)
        if not ready:
            self._note_silence()
            return False
        try:
            answer = ray.get(self._answer)
        except ray.exceptions.RayError as error:
            log.warning("%s ended (%s) and is started again", self.name, type(error).__name__)
            if self._is_asked:
                self._end()
            else:
                self.problem = f"{self.name} ended while it loaded the model; give it more memory, or see Ray's logs"
                self._end(_RETRY_S)
            return False
        problem = self._judge_canary(answer) if self._is_asked else self._judge_description(answer)
        if problem:
            log.error("%s: %s", self.name, problem)
            self.problem = problem
            self._end(_RETRY_S)
            return False
        self._is_asked, self.state, self.problem = False, "ready", ""
        self._deliver_late()
        return True

    def check(self) -> None:
        """Ask for the canary. Until it is late, the replica stays ready."""
        self._ask_canary()

    def park(self) -> None:
        """End the process until `restore` is called again."""
        if self.state != "parked":
            self._end()
            self.state = "parked"

    def start(self) -> None:
        """Start a replica, if there is none, it is time, and the head answers: starting one waits for it."""
        if not self._is_closed and self._actor is None and time.monotonic() >= self._since:
            if not head_answers(self._replicas.ray):
                self._since = time.monotonic() + _RETRY_S
                return
            self._actor, self.state = self._replicas.new_actor(), "starting"
            self._place, self._answer = self._actor.place.remote(), self._actor.load.remote()
            self._since, self._is_asked = time.monotonic(), False

    def has_place(self) -> bool:
        """Return true if the process of the replica runs, or did."""
        return self._actor is not None and bool(self._replicas.ray.wait([self._place], timeout=0)[0])

    def close(self) -> None:
        """End the replica."""
        self._is_closed = True
        self._end()

    def _ask_canary(self) -> None:
        self._answer = self._actor.forward.remote(_packed([[self._replicas.canary]]))
        self._since, self._is_asked = time.monotonic(), True

    def _note_silence(self) -> None:
        """Suspect a replica whose canary is late, and end a suspect. One that loads may take its time."""
        seconds = time.monotonic() - self._since
        if not self._is_asked:
            return
        self.state = "suspect"
        if seconds > _SUSPECT_S:
            log.warning("%s has not answered for %.0f s and is replaced", self.name, seconds)
            self._end()

    def _judge_description(self, answer: ReplicaDescription | UnmaskError) -> str:
        """Return why a loaded replica may not take part; empty if it may."""
        if isinstance(answer, UnmaskError):
            return str(answer)
        try:
            self._replicas.agree(answer)
        except ClusterError as error:
            return str(error)
        self.place, self._threads, self._device = answer.place, answer.threads, answer.device
        self.tokens_per_second = answer.tokens_per_second
        log.info("%s is ready at %s", self.name, answer.place)
        return ""

    def _judge_canary(self, answer: tuple[list[PackVectors], int]) -> str:
        outcome = answer[0][0]
        is_right = not outcome.errors and self._replicas.is_right(outcome.vectors[0])
        return "" if is_right else "its canary is wrong; a new replica takes its place"

    def _deliver_late(self) -> None:
        """Deliver the answer that was late. It came before that of the canary."""
        late, self._late = self._late, None
        if late is not None:
            reference, deliver = late
            try:
                outcomes, self._pack_tokens = self._replicas.ray.get(reference)
            except self._replicas.ray.exceptions.RayError:
                return  # its prompts are computed by others
            for number, outcome in enumerate(outcomes):
                deliver(number, outcome)

    def _end(self, pause_s: float = 0.0) -> None:
        """End the process of the replica, if there is one. The next may start after a pause."""
        actor, self._actor, self._late = self._actor, None, None
        self.state, self._is_asked, self._since = "starting", False, time.monotonic() + pause_s
        if actor is not None:
            kill_actor(self._replicas.ray, actor)


def open_replicas(
    model: str, load: LoadOptions, load_encoder: Callable[[], Encoder], options: ReplicaOptions
) -> tuple[RemoteEncoder, Replicas]:
    """Open a model without its weights, start its replicas, and wait for the first one.

    This process must be connected to the cluster.

    Args:
        model: id, folder or file, as for `Encoder.load`.
        load: options of the text handling; the device is that of the replicas alone.
        load_encoder: loads the model in each replica, so it must be picklable.

    Raises:
        CheckpointError: the model's files cannot be read here.
        ClusterError: no replica could start.
    """
    checkpoint = open_checkpoint(model, load.adapters, weights=False)
    pooling, max_length, prompts = prompts_for(checkpoint, load)
    canary = prompts.build(probe_texts()[:1])[0]
    replicas = Replicas(import_ray(), load_encoder, _tokens_digest(prompts), canary, options)
    try:
        replicas.wait_for_one(options.replica_wait)
    except BaseException:
        replicas.close()
        raise
    first = replicas.first
    assert first is not None, "a replica that is ready has agreed"
    encoder = RemoteEncoder(
        checkpoint=checkpoint,
        revision=first.model["revision"],
        prompts=prompts,
        pooling=pooling,
        max_length=max_length,
        compat=load.compat,
        dim=first.model["dim"],
        dtype_choice=first.dtype_choice,
        num_parameters=first.num_parameters,
    )
    return encoder, replicas


def _tokens_digest(prompts: PromptBuilder) -> str:
    """Return a digest of how a model's text handling reads a few texts."""
    digest = hashlib.sha256()
    for prompt in prompts.build(probe_texts(), "An instruction:"):
        digest.update(b"%d:%d:" % prompt.pooled + prompt.ids.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _packed(packs: Sequence[Sequence[Prompt]]) -> _Packs:
    """Return packs as three arrays: Ray takes longer for many small ones."""
    prompts = [prompt for pack in packs for prompt in pack]
    ids = np.concatenate([prompt.ids for prompt in prompts]).astype(np.int32)
    spans = np.array([(len(prompt.ids), *prompt.pooled) for prompt in prompts], dtype=np.int32)
    return ids, spans, [len(pack) for pack in packs]


def _unpacked(packs: _Packs) -> list[list[Prompt]]:
    ids, spans, counts = packs
    ids, prompts, first = ids.astype(np.int64), [], 0
    for length, start, end in spans.tolist():
        prompts.append(Prompt(ids[first : first + length], (start, end), length))
        first += length
    borders = np.cumsum([0, *counts]).tolist()
    return [prompts[begin:end] for begin, end in pairwise(borders)]
