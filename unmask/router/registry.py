"""The models of one process: each loaded on first use, checked by its canary, kept until the end."""

import asyncio
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import msgspec
import numpy as np

from unmask.catalogue import Catalogue, Record, record_for
from unmask.catalogue.canary import CANARY_TEXT, compare
from unmask.encoder import Dtype, Encoder, require_device
from unmask.engine import Engine
from unmask.errors import CheckpointError, EngineError, ModelLoading, UnmaskError, UsageError

log = logging.getLogger("unmask")

State = Literal["cold", "loading", "ready", "failed"]

_CANARY_SECONDS = 30.0  # how long a passed canary is believed
_RETRY_FAILED_SECONDS = 60.0


# What the weights themselves tell once they are loaded, whatever a record says.
LOADED = ("architecture", "base", "parameters", "dimensions", "max_tokens", "pooling", "revision")


# The encoder, what its weights say of themselves, and its vector for the canary text.
_Opened = tuple[Encoder, dict[str, Any], np.ndarray]


class ServedModel:
    """One model id, from cold to ready.

    Args:
        source: id, folder or file that the weights are loaded from.
        queue_tokens, cache_bytes, dtype, device: see `Models`.
        record: what is known of it; left out, what ships or what its name says.
    """

    def __init__(
        self,
        source: str,
        queue_tokens: int,
        cache_bytes: int = 0,
        record: Record | None = None,
        dtype: Dtype = "float32",
        device: str = "cpu",
    ) -> None:
        self.source = source
        self.record: Record = record or record_for(source)
        self.state: State = "cold"
        self.reason = ""
        self._queue_tokens, self._cache_bytes = queue_tokens, cache_bytes
        self.dtype: Dtype = dtype
        self._device = device
        self._engine: Engine | None = None
        self._loading: asyncio.Task[None] | None = None
        self._begun: Future[_Opened] | None = None
        self._expected: np.ndarray | None = None
        self._canary: tuple[float, str] = (0.0, "not checked yet")
        self._changed_at = time.monotonic()
        self._load_seconds = 5.0

    def begin(self) -> None:
        """Load from now on in a thread, where there is no event loop yet: `engine` then waits for that."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="unmask-load")
        self._begun = thread.submit(self._open)
        thread.shutdown(wait=False)

    async def engine(self, wait: float = 0.0) -> Engine:
        """The running engine, loading the model if this is its first use.

        Args:
            wait: seconds the caller will hold on while it loads.

        Raises:
            ModelLoading: not ready within `wait`; carries `retry_after`.
            CheckpointError: it could not be loaded. Tried again at most once a minute.
        """
        if self._engine is not None:
            return self._engine
        now = time.monotonic()
        if self.state == "failed" and now - self._changed_at < _RETRY_FAILED_SECONDS:
            raise CheckpointError(self.reason)
        if self._loading is None or self._loading.done():
            self._set("loading")
            self._loading = asyncio.create_task(self._load())
        # Shielded: one caller giving up must not stop the load for the others.
        await asyncio.wait([self._loading], timeout=wait)
        if self._engine is not None:
            return self._engine
        if self.state == "failed":
            raise CheckpointError(self.reason)
        left = self._load_seconds - (time.monotonic() - self._changed_at)
        raise ModelLoading(f"{self.record.id} is being loaded; try again shortly", retry_after=max(1.0, left))

    async def canary(self) -> str:
        """ "ok", or what is wrong with the vector that the engine gives for the canary text right now."""
        if self._engine is None or self._expected is None:
            return self.reason or self.state
        checked, verdict = self._canary
        if verdict == "ok" and time.monotonic() - checked < _CANARY_SECONDS:
            return verdict
        try:
            prompts = await self._engine.prepare([self._canary_text()])
            deadline = time.monotonic() + 60.0
            vector = (await self._engine.run(prompts, deadline=deadline, caller="canary", afresh=True))[0]
            verdict = compare(vector, self._expected)
        except EngineError as error:
            verdict = str(error)
        self._canary = (time.monotonic(), verdict)
        return verdict

    def learn(self, record: Record) -> None:
        """Take in a record that has changed, keeping what the loaded weights said."""
        if self._engine is not None:
            known = {name: getattr(self.record, name) for name in LOADED}
            record = msgspec.structs.replace(record, **known)
        self.record = record

    async def close(self, grace: float) -> None:
        """Finish accepted work and stop."""
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=grace)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, grace)

    async def _load(self) -> None:
        began = time.monotonic()
        try:
            begun, self._begun = self._begun, None
            opened = asyncio.wrap_future(begun) if begun is not None else asyncio.to_thread(self._open)
            encoder, known, expected = await opened
        except UnmaskError as error:
            self._set("failed", str(error))
            log.error("%s could not be loaded: %s", self.record.id, error)
            return
        except Exception:
            # Anything else is our own fault; the model is out of service, the others are not.
            self._set("failed", f"{self.record.id} could not be loaded because of an internal error")
            log.exception("%s could not be loaded", self.record.id)
            return
        # What the record says may have changed meanwhile; what the weights say has not.
        self.record, self._expected = msgspec.structs.replace(self.record, **known), expected
        self._engine = Engine(encoder, queue_tokens=self._queue_tokens, cache_bytes=self._cache_bytes)
        self._load_seconds = time.monotonic() - began
        self._set("ready")
        log.info("%s is ready after %.1f s", self.record.id, self._load_seconds)

    def _open(self) -> _Opened:
        record = self.record
        encoder = Encoder.load(self.source, compat=record.compat, dtype=self.dtype, device=self._device)
        if record.revision is not None and encoder.checkpoint.revision != record.revision:
            raise CheckpointError(
                f"{record.id} went live with the weights {record.revision}, and {self.source} holds "
                f"{encoder.checkpoint.revision}: put the files back, or run 'unmask onboard {record.id}' again"
            )
        own = encoder.encode([self._canary_text()])[0]
        # The model and the libraries that came with it stay: looking through them for garbage would stop all requests.
        gc.collect()
        gc.freeze()
        if record.canary is not None and (verdict := compare(own, record.canary.expected(), self.dtype)) != "ok":
            raise CheckpointError(f"{record.id} loaded, but its weights are not the published ones: {verdict}")
        config = encoder.checkpoint.config
        trained_as = encoder.checkpoint.trained_as
        known = {
            "architecture": record.architecture or str(config.get("model_type")),
            "base": record.base or (trained_as if "/" in trained_as else None),
            "parameters": encoder.parameters,
            "dimensions": encoder.dim,
            "max_tokens": encoder.max_length,
            "pooling": encoder.pooling,
            "revision": encoder.checkpoint.revision,
        }
        return encoder, known, own

    def _canary_text(self) -> str:
        return self.record.canary.text if self.record.canary is not None else CANARY_TEXT

    def _set(self, state: State, reason: str = "") -> None:
        self.state, self.reason, self._changed_at = state, reason, time.monotonic()


class Models:
    """All models that this process answers for, and the catalogue of what they are.

    Args:
        names: ids, folders or files, as given on the command line; the first is listed first.
        catalogue: where their records are; left out, those that ship. What is served and not in it is added.
        sources: where the weights of a model are, for those whose id does not say.
        warm: those to load at start rather than on first use.
        queue_tokens: per model, tokens that may wait.
        cache_bytes: per model, memory for vectors of inputs that were asked for before.
        dtype, device: precision and place of every model's weights, as for `Encoder.load`.

    Raises:
        UsageError: two models would answer to the same name, a warm one is not among them, or the device is not here.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        warm: Sequence[str] = (),
        queue_tokens: int = 262_144,
        cache_bytes: int = 0,
        dtype: Dtype = "float32",
        device: str = "cpu",
        catalogue: Catalogue | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        require_device(device, dtype)
        self.catalogue = catalogue or Catalogue.shipped()
        self._queue_tokens, self._cache_bytes = queue_tokens, cache_bytes
        self._dtype: Dtype = dtype
        self._device = device
        self._models: list[ServedModel] = []
        self._by_id: dict[str, ServedModel] = {}
        for name in dict.fromkeys(names):
            entry = self.catalogue.get(name)
            known = entry.record if entry is not None and entry.record.id == name else None
            self.add((sources or {}).get(name, name), known)
        self._warm = [self._named(name) for name in dict.fromkeys(warm)]

    def add(self, source: str, record: Record | None = None) -> ServedModel:
        """Answer for one more model from now on. It is loaded with its first request.

        Args:
            source: where its weights are.
            record: what it is; left out, what ships or what its name says.

        Raises:
            UsageError: another model has its name.
        """
        model = ServedModel(source, self._queue_tokens, self._cache_bytes, record, self._dtype, self._device)
        names = (model.record.id, *model.record.aliases)
        if taken := next((name for name in names if name in self._by_id), None):
            raise UsageError(f"two models would both be called {taken!r}; rename the folder of one of them")
        if self.catalogue.get(model.record.id) is None:
            self.catalogue.put(model.record)
        self._models = [*self._models, model]
        self._by_id |= dict.fromkeys(names, model)
        return model

    def remove(self, id: str) -> ServedModel | None:
        """Answer for a model no more. Returns it, to be closed once what it has accepted is done; None if there is
        none of this id."""
        model = self._by_id.get(id)
        if model is not None:
            self._models = [other for other in self._models if other is not model]
            self._warm = [other for other in self._warm if other is not model]
            self._by_id = {name: other for name, other in self._by_id.items() if other is not model}
        return model

    def _named(self, name: str) -> ServedModel:
        model = self.find(name) or next((model for model in self._models if model.source == name), None)
        if model is None:
            raise UsageError(f"{name} is to be warmed but is not among the served models")
        return model

    def list(self) -> list[ServedModel]:
        """In the order given."""
        return list(self._models)

    def find(self, id: str) -> ServedModel | None:
        """By id or alias."""
        return self._by_id.get(id)

    def begin(self) -> None:
        """Begin loading the warm models in threads, while the rest of the process is still being built."""
        for model in self._warm:
            model.begin()

    async def start(self) -> None:
        """See to it that the warm models are being loaded, without waiting for them."""
        for model in self._warm:
            try:
                await model.engine()
            except UnmaskError as error:
                log.info("%s", error)

    async def canaries(self) -> dict[str, str]:
        """For each model that is warm or loaded: "ok", or why it may not answer."""
        checked = [model for model in self._models if model in self._warm or model.state != "cold"]
        verdicts = await asyncio.gather(*(model.canary() for model in checked))
        return {model.record.id: verdict for model, verdict in zip(checked, verdicts, strict=True)}

    async def close(self, grace: float = 30.0) -> None:
        """Finish what was accepted, then stop every engine."""
        await asyncio.gather(*(model.close(grace) for model in self._models))
