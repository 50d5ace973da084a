"""`ServedModel`: one model of the server, loaded on first use and checked by its canary."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np

from unmask.catalogue import Catalogue, Record, record_for
from unmask.catalogue.canary import CANARY_TEXT, check_vector, expected_vector
from unmask.catalogue.known_vectors import canary_problem
from unmask.checkpoint import open_checkpoint
from unmask.cluster.options import ReplicaOptions
from unmask.conformance import PrecisionClass, References
from unmask.conformance.references import PRECISION_CLASSES, SHARED_PRECISIONS
from unmask.encoder import DtypeChoice, Encoder, LoadOptions
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.encoder.remote_encoder import RemoteEncoder
from unmask.engine import Engine
from unmask.engine.hand import Hand
from unmask.errors import CheckpointError, ClusterLost, EngineError, ModelLoading, NoConformingProvider, UnmaskError

log = logging.getLogger("unmask")

State = Literal["cold", "loading", "ready", "failed", "remote"]

# Fields of a record that the loaded weights decide, whatever the catalogue says.
FIELDS_OF_WEIGHTS = ("architecture", "base", "parameters", "dimensions", "max_tokens", "pooling", "revision")

# Fields that the model's own files fill where the record, or the operator, says nothing.
FIELDS_OF_FILES = ("query_instruction", "document_instruction", "matryoshka")

_CANARY_VALID_S = 30.0  # time for which a passed canary is not computed again
_RETRY_FAILED_S = 60.0
_LEASE_POLL_S = 0.05
_SHARED_SPACE = "providers answer for the model as well, and vectors of float32 may be mixed with theirs"
# Seconds after which a request may come again while the cluster is lost. It is looked for more often.
_RETRY_LOST_S = 15.0


@dataclass(frozen=True, eq=False)
class _LoadedModel:
    """A model that is ready for an engine.

    Attributes:
        encoder: the model, or the description of one in replicas.
        revision: of its weights.
        encode: raw vectors of texts.
        hands, least_hands: of the replicas, see `Engine`; None for a model in this process.
        close: ends the replicas.
        fields: of the record, which the model's files decide.
        canary_vector: its vector of the canary text.
    """

    encoder: Encoder | RemoteEncoder
    revision: str
    encode: Callable[[list[str]], np.ndarray]
    hands: Sequence[Hand] | None = None
    least_hands: int | None = None
    close: Callable[[], None] = lambda: None
    fields: dict[str, Any] = field(default_factory=dict)
    canary_vector: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that all models of a server are loaded with.

    Attributes:
        queue_tokens: tokens that may wait in each model's engine.
        cache_bytes: memory of each model for vectors of recent inputs; 0 for none.
        dtype, device: precision and device of the weights, as for `Encoder.load`.
        replicas: number and size of the processes that compute; None for this process alone. It must be connected to
            a cluster.
    """

    queue_tokens: int = 262_144
    cache_bytes: int = 0
    dtype: DtypeChoice = "auto"
    device: str = "cpu"
    replicas: ReplicaOptions | None = None


class ServedModel:
    """One model, from cold to ready.

    Args:
        source: id, folder or file to load the weights from.
        record: its catalogue record; None for the shipped one, or one made from its name.
        options: precision, device, queue and cache.
        catalogue: records of other models, one of which may know the same files; None for none.
        is_remote: tells of a model's id whether providers alone answer for it, and it is never loaded.
        has_providers: tells of a model's id whether providers answer for it as well.

    Attributes:
        reason: why loading failed; empty otherwise. May name files of this machine.
        is_lost: the cluster of its replicas is lost.
    """

    def __init__(
        self,
        source: str,
        record: Record | None = None,
        options: ModelOptions | None = None,
        catalogue: Catalogue | None = None,
        is_remote: Callable[[str], bool] = lambda id: False,
        has_providers: Callable[[str], bool] = lambda id: False,
    ) -> None:
        self.source = source
        self._is_remote, self._has_providers = is_remote, has_providers
        self._catalogue = catalogue or Catalogue()
        self.options = options or ModelOptions()
        self.record: Record = record or record_for(source)
        self._state: State = "cold"
        self.reason = ""
        self._engine: Engine | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._preload: Future[_LoadedModel] | None = None
        self._canary_vector: np.ndarray | None = None
        self._canary_check: tuple[float, str] = (0.0, "not checked yet")  # time and verdict
        self._changed_at = time.monotonic()
        self._load_seconds = 5.0
        self._dtype_choice: PrecisionChoice | None = None
        self._catalogue_record = self.record  # before weights and files add their fields
        self._replaced: set[Engine] = set()  # engines that finish the requests of an earlier revision
        self._renewal: asyncio.Task[None] | None = None
        self._is_renewal_due = False  # the files may have changed since they were read
        self._is_closing = False
        self.is_lost, self._was_cold = False, True
        self._live_revision = self.record.revision  # of the catalogue
        self._fields_of_references: dict[str, Any] = {}
        self._settings: Mapping[str, Any] = {}  # of the model's files, once they were read

    @property
    def state(self) -> State:
        """cold, loading, ready or failed; remote if providers alone answer for it."""
        return "remote" if self._is_remote(self.record.id) else self._state

    @property
    def dtype(self) -> DtypeChoice:
        """Precision of the weights; "auto" until loading has chosen one."""
        return self.options.dtype if self._dtype_choice is None else cast(DtypeChoice, self._dtype_choice.dtype)

    @property
    def dtype_reason(self) -> str:
        """The measurement or the reason that led to the precision; empty where the operator chose it."""
        if self.options.dtype != "auto" or self._dtype_choice is None:
            return ""
        return self._dtype_choice.reason if self._dtype_to_load() != self.dtype else _SHARED_SPACE

    @property
    def precision_class(self) -> PrecisionClass | None:
        """Class of the model's vectors here, loaded or not; None where loading will choose it."""
        dtype = self._dtype_to_load() if self._dtype_choice is None else self.dtype
        if self.state == "remote":
            return "exact"
        return None if dtype == "auto" else PRECISION_CLASSES[dtype]

    def _dtype_to_load(self) -> DtypeChoice:
        """Return the precision to ask for. One that loading chose could be of another space than the providers'."""
        is_free = self.options.dtype == "auto" and self._has_providers(self.record.id)
        return "float32" if is_free else self.options.dtype

    def preload(self) -> None:
        """Begin to load in a thread, before there is an event loop. `engine` then waits for that thread."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="unmask-load")
        self._preload = thread.submit(self._load_weights)
        thread.shutdown(wait=False)

    async def engine(self, wait: float = 0.0) -> Engine:
        """Return the running engine. The first use loads the model.

        Args:
            wait: seconds that the caller waits for a model that is being loaded.

        Raises:
            ModelLoading: not ready within `wait`; carries `retry_after`.
            CheckpointError: it could not be loaded. Loading is tried again at most once a minute.
            ClusterLost: its replicas cannot be reached; carries `retry_after`.
            NoConformingProvider: it is never loaded here.
        """
        if self._engine is not None:
            return self._engine
        if self.state == "remote":
            message = "this server answers for the model through providers alone, which cannot do this"
            raise NoConformingProvider(message, retry_after=60.0)
        now = time.monotonic()
        if self.is_lost:
            raise ClusterLost(self.reason, _RETRY_LOST_S)
        if self.state == "failed" and now - self._changed_at < _RETRY_FAILED_S:
            raise CheckpointError(self.reason)
        self.load_in_background()
        assert self._load_task is not None
        # `asyncio.wait` leaves the task running: one caller giving up must not stop the load for the others.
        await asyncio.wait([self._load_task], timeout=wait)
        if self._engine is not None:
            return self._engine
        if self.is_lost:
            raise ClusterLost(self.reason, _RETRY_LOST_S)
        if self.state == "failed":
            raise CheckpointError(self.reason)
        seconds_left = self._load_seconds - (time.monotonic() - self._changed_at)
        raise ModelLoading(f"{self.record.id} is being loaded; try again shortly", retry_after=max(1.0, seconds_left))

    def load_in_background(self) -> None:
        """Begin to load, if nothing has begun it and it did not fail lately. Needs a running event loop."""
        failed_lately = self.state == "failed" and time.monotonic() - self._changed_at < _RETRY_FAILED_S
        is_loading = self._load_task is not None and not self._load_task.done()
        if self._engine is None and not (failed_lately or self.is_lost or is_loading):
            self._set_state("loading")
            self._load_task = asyncio.create_task(self._load())

    async def canary(self) -> str:
        """Compute the canary's vector with the running engine. Return "ok", or what is wrong."""
        engine, right = self._engine, self._canary_vector
        if engine is None or right is None:
            return self.reason or self.state
        checked_at, verdict = self._canary_check
        if verdict == "ok" and time.monotonic() - checked_at < _CANARY_VALID_S:
            return verdict
        try:
            with engine.lease():
                prompts = await engine.prepare([self._canary_text()])
                deadline = time.monotonic() + 60.0
                vectors = await engine.run(prompts, deadline=deadline, caller="canary", use_cache=False)
            verdict = check_vector(vectors[0], right)
        except EngineError as error:
            verdict = str(error)
        if engine is self._engine:
            self._canary_check = (time.monotonic(), verdict)
        return verdict

    def renew_in_background(self) -> None:
        """Put the revision that the model's files have now in the place of the one that answers, if it is another.

        The new one is loaded and checked beside the old one. Requests that the old one has begun are finished by it,
        and later ones go to the new one, so no request gets vectors of both. After a fault the old one goes on. Where
        the files are being read already, or an old revision still finishes its requests, they are read again after
        that. Needs a running event loop.
        """
        is_loading = self._load_task is not None and not self._load_task.done()
        if self._is_closing or (self._engine is None and not is_loading):
            return  # its next load reads the files of then
        self._is_renewal_due = True
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew_while_due())
        else:
            log.info("%s: its files are read again once the present change of its revision has ended", self.record.id)

    async def _renew_while_due(self) -> None:
        if self._load_task is not None:
            await asyncio.wait([self._load_task])
        while self._is_renewal_due and self._engine is not None and not self._is_closing:
            self._is_renewal_due = False
            await self._renew()

    async def _renew(self) -> None:
        old, revision, id = self._engine, self.record.revision, self.record.id
        assert old is not None, "the model is loaded"
        log.info("%s: its files are read again", id)
        try:
            loaded = await asyncio.to_thread(self._load_other, revision)
        except UnmaskError as error:
            log.error("%s goes on with the revision %s: %s", id, revision, error)
            return
        except Exception:
            log.exception("%s goes on with the revision %s", id, revision)
            return
        if loaded is None:
            log.info("%s: its files have the revision %s, which answers already", id, revision)
            return
        if self._is_closing or self.is_lost:
            await asyncio.to_thread(loaded.close)
            return
        self._take(loaded)
        log.info("%s answers with the revision %s; %s finishes its requests", id, loaded.revision, revision)
        self._replaced.add(old)
        while old.leases:  # noqa: ASYNC110 - each ends at the deadline of its request
            await asyncio.sleep(_LEASE_POLL_S)
        await asyncio.to_thread(old.close)
        self._replaced.discard(old)
        del old
        await asyncio.to_thread(_free_replaced)
        log.info("%s: the revision %s has ended", id, revision)

    def update_record(self, record: Record) -> None:
        """Replace the record by a newer one. Fields that the loaded weights decide stay."""
        self._live_revision, self._catalogue_record = record.revision, record
        own_fields = self._fields_of_references
        if self._engine is not None:
            own_fields = {name: getattr(self.record, name) for name in FIELDS_OF_WEIGHTS}
        self.record = msgspec.structs.replace(record, **own_fields, **_fields_of_files(record, self._settings))

    def take_files(self, settings: Mapping[str, Any], references: References) -> None:
        """Take what the files and the references of a model that has providers say about it, before it is loaded.

        Args:
            settings: the encoder's, from the model's files: the instructions that providers are to be given.
            references: its right vectors; for a model that is never loaded, they decide what the weights would.

        Raises:
            CheckpointError: the references are of other weights than those that went live.
        """
        if self._live_revision not in (None, references.revision):
            raise CheckpointError(
                f"{self.record.id} went live with the weights {self._live_revision}, and the references are of "
                f"{references.revision}: make them of the right weights, or run 'unmask onboard {self.record.id}' again"
            )
        if self.options.dtype == "auto" and self.precision_class not in SHARED_PRECISIONS:
            log.warning(
                "%s was loaded in %s before it had providers, and float32 and float16 are another vector space: they "
                "answer only who asks for them. The next start loads float32, unless --dtype says otherwise",
                *(self.record.id, self.dtype),
            )
        fields = {
            "dimensions": references.dim,
            "max_tokens": references.max_tokens,
            "pooling": references.pooling,
            "revision": references.revision,
        }
        self._settings, self._fields_of_references = settings, fields if self.state == "remote" else {}
        own_fields = self._fields_of_references | _fields_of_files(self.record, settings)
        self.record = msgspec.structs.replace(self.record, **own_fields)

    async def lose_replicas(self, fault: str, grace: float) -> None:
        """Answer nothing until `find_replicas`, for the cluster is lost. Requests under way have a few seconds more."""
        reason = f"the cluster that computes for {self.record.id} is lost ({fault}): try again later"
        self.is_lost, self._was_cold = True, self._state == "cold"
        engines = [*self._replaced, *([self._engine] if self._engine is not None else [])]
        self._engine = None
        self._set_state("failed", reason)
        error = ClusterLost(reason, _RETRY_LOST_S)
        await asyncio.gather(*(asyncio.to_thread(engine.close, grace, error) for engine in engines))
        await self._finish_loading(grace)

    def find_replicas(self) -> None:
        """Load the model again if it was: this process is connected to a cluster. Needs a running event loop."""
        self.is_lost = False
        self._set_state("cold")
        if not self._was_cold:
            self.load_in_background()

    async def close(self, grace: float) -> None:
        """Finish accepted requests within `grace` seconds, and stop."""
        self._is_closing, end = True, time.monotonic() + grace
        await self._finish_loading(grace)
        engines = [*self._replaced, *([self._engine] if self._engine is not None else [])]
        left = max(0.0, end - time.monotonic())
        await asyncio.gather(*(asyncio.to_thread(engine.close, left) for engine in engines))

    async def _finish_loading(self, grace: float) -> None:
        if tasks := [task for task in (self._load_task, self._renewal) if task is not None]:
            await asyncio.wait(tasks, timeout=grace)

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            preload, self._preload = self._preload, None
            loading = asyncio.wrap_future(preload) if preload is not None else asyncio.to_thread(self._load_weights)
            loaded = await loading
        except UnmaskError as error:
            self._fail(str(error))
            log.error("%s could not be loaded: %s", self.record.id, error)
            return
        except Exception:
            # Any other exception is a bug of ours. This model is out of service, the others are not.
            self._fail(f"{self.record.id} could not be loaded because of an internal error")
            log.exception("%s could not be loaded", self.record.id)
            return
        if self.is_lost:
            await asyncio.to_thread(loaded.close)
            return
        self._take(loaded)
        self._load_seconds = time.monotonic() - started
        self._set_state("ready")
        log.info("%s is ready after %.1f s", self.record.id, self._load_seconds)

    def _take(self, loaded: _LoadedModel) -> None:
        """Answer with a loaded model from now on."""
        # The record may have changed while the weights were loaded; the fields of the weights have not.
        self.record, self._canary_vector = (
            msgspec.structs.replace(self._catalogue_record, **loaded.fields),
            loaded.canary_vector,
        )
        self._canary_check = (0.0, "not checked yet")
        self._dtype_choice = loaded.encoder.dtype_choice
        self._settings = loaded.encoder.checkpoint.encoder_config
        self._engine = Engine(
            loaded.encoder,
            queue_tokens=self.options.queue_tokens,
            cache_bytes=self.options.cache_bytes,
            hands=loaded.hands,
            least_hands=loaded.least_hands,
        )

    def _load_other(self, revision: str | None) -> _LoadedModel | None:
        """Load the model, unless its files still have a revision. Only replicas can see the weights of replicas."""
        if self.options.replicas is None and open_checkpoint(self.source).revision == revision:
            return None
        loaded = self._load_weights()
        if loaded.revision != revision:
            return loaded
        loaded.close()
        return None

    def _load_weights(self) -> _LoadedModel:
        dtype = self._dtype_to_load()
        replicas = self.options.replicas
        loaded = self._load_here(dtype) if replicas is None else self._load_replicas(replicas, dtype)
        if self._dtype_to_load() != dtype:  # the file of providers has changed meanwhile
            loaded.close()
            return self._load_weights()
        try:
            return self._checked(loaded)
        except BaseException:
            loaded.close()
            raise

    def _load_here(self, dtype: DtypeChoice) -> _LoadedModel:
        encoder = Encoder.load(self.source, compat=self.record.compat, dtype=dtype, device=self.options.device)
        # The model and its libraries stay for good. Searching them for garbage would stop all requests again and again.
        gc.collect()
        gc.freeze()
        return _LoadedModel(encoder, encoder.checkpoint.revision, encoder.encode)

    def _load_replicas(self, replicas: ReplicaOptions, dtype: DtypeChoice) -> _LoadedModel:
        from unmask.cluster.replicas import open_replicas

        options, compat = self.options, self.record.compat
        source = str(Path(self.source).absolute()) if Path(self.source).exists() else self.source
        load = partial(Encoder.load, source, compat=compat, dtype=dtype, device=options.device)
        encoder, group = open_replicas(self.source, LoadOptions(compat=compat), load, replicas)

        def encode(texts: list[str]) -> np.ndarray:
            return group.vectors(encoder.prompts.build(texts))

        return _LoadedModel(encoder, encoder.revision, encode, group.hands, group.least, group.close)

    def _checked(self, loaded: _LoadedModel) -> _LoadedModel:
        """Check the revision and the canary of a loaded model, and add the fields of the record that it decides."""
        record, encoder, dtype = self._catalogue_record, loaded.encoder, loaded.encoder.dtype_choice.dtype
        if self._live_revision not in (None, loaded.revision):
            raise CheckpointError(
                f"{record.id} went live with the weights {self._live_revision}, and {self.source} holds "
                f"{loaded.revision}: put the files back, or run 'unmask onboard {record.id}' again"
            )
        canary_vector = loaded.encode([self._canary_text()])[0]
        # A folder without a record of its own may hold the files of a model that has one.
        reference = record
        if record.canary is None:
            reference = self._catalogue.with_revision(loaded.revision, encoder.compat)
        if reference is not None and reference.canary is not None:
            vector = canary_vector if reference is record else loaded.encode([reference.canary.text])[0]
            if (verdict := check_vector(vector, expected_vector(reference.canary), dtype)) != "ok":
                raise CheckpointError(f"{record.id} loaded, but {canary_problem(reference)}: {verdict}")
        config = encoder.checkpoint.config
        trained_as = encoder.checkpoint.trained_as
        fields = {
            "architecture": record.architecture or str(config.get("model_type")),
            "base": record.base or (trained_as if "/" in trained_as else None),
            "parameters": encoder.num_parameters,
            "dimensions": encoder.dim,
            "max_tokens": encoder.max_length,
            "pooling": encoder.pooling,
            "revision": loaded.revision,
            **_fields_of_files(record, encoder.checkpoint.encoder_config),
        }
        return replace(loaded, fields=fields, canary_vector=canary_vector)

    def _canary_text(self) -> str:
        return self.record.canary.text if self.record.canary is not None else CANARY_TEXT

    def _fail(self, reason: str) -> None:
        """Say why loading failed, unless the cluster is lost: that is then the reason."""
        if not self.is_lost:
            self._set_state("failed", reason)

    def _set_state(self, state: State, reason: str = "") -> None:
        self._state, self.reason, self._changed_at = state, reason, time.monotonic()


def _free_replaced() -> None:
    """Free a model that was taken for one that stays for good."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _fields_of_files(record: Record, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `FIELDS_OF_FILES`: the record's where it has one, else those in the model's files."""
    fields = {name: getattr(record, name) or settings.get(name) for name in FIELDS_OF_FILES}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if value}
