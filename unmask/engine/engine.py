"""`Engine`: batches the requests of many callers through one loaded model."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from unmask.encoder import Encoder, Prompt
from unmask.encoder.packing import balance, pack_budget, parallel_packs
from unmask.encoder.prompts import DefaultPrompts
from unmask.engine.queue import FairQueue, QueuedPrompt, QueuedRequest
from unmask.engine.recent_vectors import RecentVectors, cache_key
from unmask.errors import DeadlineExceeded, EngineError, EngineStopped, InputError, Overloaded

log = logging.getLogger("unmask")

# Texts of fewer characters are tokenised faster than they are handed to a thread.
_INLINE_CHARACTERS = 2000

# Smaller forwards measure overhead rather than speed. Until a larger one has run, no request is refused by deadline.
_MIN_MEASURED_TOKENS = 256

# Share of the measured speed that admission counts on: the next texts may be longer, and the machine busier.
_SAFE_SHARE = 0.75

# Share of the tokens computable before a deadline that callers with queued tokens may fill. The rest is reserved for
# callers with an empty queue.
_QUEUED_SHARE = 0.75

# One forward at a time in this process, whatever the number of models: two at once would slow each other down.
_COMPUTE_LOCK = threading.Lock()


class Engine:
    """Batches the requests of many callers through one encoder, in its own thread.

    Args:
        encoder: the loaded model.
        queue_tokens: most tokens in the queue; requests beyond it are refused.
        pack_tokens: most tokens of one forward; halved when memory runs out.
        cache_bytes: memory for vectors of recent prompts; 0 for no cache.

    Attributes:
        reused_prompts: number of prompts answered without a forward.
        tokens_per_second: measured speed, a moving average; None until a large forward has run.
    """

    def __init__(
        self, encoder: Encoder, *, queue_tokens: int = 262_144, pack_tokens: int = 16_384, cache_bytes: int = 0
    ) -> None:
        self.encoder = encoder
        self.tokens_per_second: float | None = None
        self.reused_prompts = 0
        self._recent = RecentVectors(cache_bytes) if cache_bytes else None
        self._queue_tokens, self._pack_tokens = queue_tokens, pack_tokens
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._stopping = False
        self._anonymous = itertools.count()
        self._tokenisers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="unmask-tokenise")
        self._worker = threading.Thread(target=self._work, name=f"unmask-engine-{encoder.name}", daemon=True)
        self._worker.start()

    async def prepare(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, instruction: str = "", truncate: bool = False
    ) -> list[Prompt]:
        """Tokenise texts, in a thread if there are many characters.

        Args:
            texts: texts, or sequences of the model's own token ids.
            instruction: read by the model before each text, and not pooled.
            truncate: cut the end of texts that are too long, instead of raising.

        Raises:
            InputError and its subclasses, with the index of the input.
        """
        num_characters = sum(len(text) for text in texts)
        if num_characters <= _INLINE_CHARACTERS:
            return self._build(texts, instruction, truncate)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenisers, self._build, texts, instruction, truncate)

    def _build(self, texts: Sequence[str] | Sequence[Sequence[int]], instruction: str, truncate: bool) -> list[Prompt]:
        prompts = self.encoder.prompts
        plain_texts = [text for text in texts if isinstance(text, str)]
        if len(plain_texts) == len(texts):
            return prompts.build(plain_texts, instruction, truncate)
        if not isinstance(prompts, DefaultPrompts):
            raise InputError("token ids cannot be given in reference mode, which reads text only")
        return prompts.build_from_ids([ids for ids in texts if not isinstance(ids, str)], instruction, truncate)

    async def run(
        self,
        prompts: Sequence[Prompt],
        *,
        deadline: float | None = None,
        caller: str = "",
        use_cache: bool = True,
    ) -> np.ndarray:
        """Compute the vectors of prompts, float32 [n, dim], in their order. All or nothing.

        Prompts in the cache are not computed again, and equal prompts are computed once: a text has one vector.

        Args:
            deadline: `time.monotonic()` by which the caller needs them.
            caller: identifies a fair share of the model; all callers have equal shares. Empty: a share for this
                request alone.
            use_cache: take vectors from the cache, and put new ones into it.

        Raises:
            Overloaded: the queue is full, or this request or an admitted one would miss its deadline; carries
                `retry_after`.
            DeadlineExceeded: the deadline passed while the request waited.
            EngineStopped: the engine is closing.
        """
        if self._recent is None or not use_cache:
            return await self._compute(prompts, deadline, caller)
        vectors = np.empty((len(prompts), self.encoder.dim), dtype=np.float32)
        misses: dict[bytes, list[int]] = {}  # key -> rows
        for row, prompt in enumerate(prompts):
            key = cache_key(prompt)
            cached = self._recent.get(key)
            if cached is None:
                misses.setdefault(key, []).append(row)
            else:
                vectors[row] = cached
        self.reused_prompts += len(prompts) - len(misses)
        if misses:
            computed = await self._compute([prompts[rows[0]] for rows in misses.values()], deadline, caller)
            for (key, rows), vector in zip(misses.items(), computed, strict=True):
                vectors[rows] = vector
                self._recent.put(key, vector)
        return vectors

    async def _compute(self, prompts: Sequence[Prompt], deadline: float | None, caller: str) -> np.ndarray:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def resolve(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        request = QueuedRequest(
            prompts=list(prompts),
            vectors=np.empty((len(prompts), self.encoder.dim), dtype=np.float32),
            caller=caller or f"request {next(self._anonymous)}",
            arrived=time.monotonic(),
            deadline=deadline if deadline is not None else float("inf"),
            done=lambda error: _call_soon(loop, resolve, error),
            unfinished=len(prompts),
        )
        if not request.prompts:
            return request.vectors
        with self._changed:
            self._admit(request)
            self._queue.add(request)
            self._changed.notify()
        try:
            await asyncio.wait_for(future, None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed before the vectors were ready") from error
        finally:
            # Cancelled, timed out or refused: the caller is gone, so none of its prompts may run.
            with self._changed:
                if not request.ended:
                    self._queue.drop(request)
        return request.vectors

    def _admit(self, request: QueuedRequest) -> None:
        """Raise if the request cannot be served in time, or would make an admitted one late."""
        if self._stopping:
            raise EngineStopped("the server is shutting down; send the request to another one")
        new_tokens = sum(len(prompt.ids) for prompt in request.prompts)
        waiting = self._queue.tokens
        if waiting and waiting + new_tokens > self._queue_tokens:
            raise Overloaded(
                f"{waiting} tokens are waiting and {self._queue_tokens} may; try again shortly",
                retry_after=(waiting + new_tokens - self._queue_tokens) / (self._safe_rate() or self._queue_tokens),
            )
        rate = self._safe_rate()
        if rate is None or not waiting + self._in_flight:
            return
        now = time.monotonic()
        late = self._queue.lateness(new_tokens, request.deadline, now=now, rate=rate, running=self._in_flight)
        if late > 0:
            raise Overloaded(
                f"{waiting + self._in_flight} tokens are ahead, too many for all to be done by their deadlines",
                retry_after=late,
            )
        queued = self._queue.queued_tokens(request.caller)
        if queued:
            share = _QUEUED_SHARE * rate * (request.deadline - now) / self._queue.num_callers()
            if queued + new_tokens > share:
                raise Overloaded(
                    f"{queued} tokens of this caller are in line already, and {share:.0f} may be: others wait as well",
                    retry_after=(queued + new_tokens - share) * self._queue.num_callers() / rate,
                )

    def _safe_rate(self) -> float | None:
        """Return the tokens per second that admission counts on; None until the speed was measured."""
        return None if self.tokens_per_second is None else _SAFE_SHARE * self.tokens_per_second

    def waiting_tokens(self) -> int:
        """Return the number of tokens in the queue and in the running forward."""
        with self._changed:
            return self._queue.tokens + self._in_flight

    def close(self, grace: float = 30.0) -> None:
        """Refuse new requests, finish accepted ones for up to `grace` seconds, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._worker.join(grace)
        with self._changed:
            abandoned = self._queue.requests()
            for request in abandoned:
                self._queue.drop(request)
        for request in abandoned:
            request.done(EngineStopped("the server shut down before this request was done"))
        self._tokenisers.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        last_end = time.perf_counter()
        while True:
            with self._changed:
                while not len(self._queue) and not self._stopping:
                    self._changed.wait()
                    last_end = time.perf_counter()
                if not len(self._queue):
                    return
                now = time.monotonic()
                expired = self._queue.expired(now)
                for request in expired:
                    self._queue.drop(request)
                packs = self._take_packs(now)
                self._in_flight = sum(prompt.length for pack in packs for prompt in pack)
            for request in expired:
                request.done(DeadlineExceeded("the deadline passed before the vectors were ready"))
            if packs:
                with _COMPUTE_LOCK:
                    self.encoder.map_packs(self._run_pack, packs)
                # Measured from the end of the last forward: the gap between two forwards delays callers as well.
                start, last_end = last_end, time.perf_counter()
                self._measure(self._in_flight, last_end - start)
            with self._changed:
                self._in_flight = 0

    def _take_packs(self, now: float) -> list[list[QueuedPrompt]]:
        """Take the next prompts from the queue, as packs that end at about the same time.

        A forward ends with its longest pack, and admission counts on the speed of all cores.
        """
        waiting, device = self._queue.tokens, self.encoder.device
        count = parallel_packs(waiting, device)
        budget = min(self._pack_tokens, pack_budget(waiting, device))
        prompts = self._queue.take(count * budget, now, rate=self._safe_rate())
        return [[prompts[i] for i in rows] for rows in balance([prompt.length for prompt in prompts], count)]

    def _run_pack(self, pack: list[QueuedPrompt]) -> None:
        """Run one forward and deliver its vectors. Never raises: the thread must live on for other requests."""
        try:
            vectors = self.encoder.forward_pack([queued.prompt for queued in pack])
        except Exception as error:
            if not _out_of_memory(error) or len(pack) == 1:
                log.exception("a forward of %d sequences failed", len(pack))
                self._fail(pack, EngineError("the model failed on this request"))
                return
            self._pack_tokens = max(256, min(self._pack_tokens, sum(queued.length for queued in pack)) // 2)
            log.warning("out of memory: packs are now at most %d tokens", self._pack_tokens)
            half = len(pack) // 2
            self._run_pack(pack[:half])
            self._run_pack(pack[half:])
            return
        finite = [bool(np.isfinite(vector).all()) for vector in vectors]
        self._fail(
            [queued for queued, is_finite in zip(pack, finite, strict=True) if not is_finite],
            EngineError("the model produced a vector that is not finite; its precision may be too low"),
        )
        for queued, vector, is_finite in zip(pack, vectors, finite, strict=True):
            if is_finite:
                self._deliver(queued, vector)

    def _deliver(self, queued: QueuedPrompt, vector: np.ndarray) -> None:
        request = queued.request
        request.vectors[queued.index] = vector
        with self._changed:
            request.unfinished -= 1
            complete = request.unfinished == 0 and not request.ended
            request.ended = request.ended or complete
        if complete:
            request.done(None)

    def _fail(self, prompts: Sequence[QueuedPrompt], error: BaseException) -> None:
        for request in {id(queued.request): queued.request for queued in prompts}.values():
            with self._changed:
                is_awaited = not request.ended
                self._queue.drop(request)
            if is_awaited:
                request.done(error)

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens < _MIN_MEASURED_TOKENS:
            return
        rate = tokens / max(seconds, 1e-6)
        average = self.tokens_per_second
        self.tokens_per_second = rate if average is None else 0.8 * average + 0.2 * rate


def _call_soon(
    loop: asyncio.AbstractEventLoop, resolve: Callable[[BaseException | None], None], error: BaseException | None
) -> None:
    # The caller's event loop may have closed while its prompts were running.
    if not loop.is_closed():
        loop.call_soon_threadsafe(resolve, error)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
