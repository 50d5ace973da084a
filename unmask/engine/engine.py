"""`Engine`: one loaded model shared by many callers."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from unmask.encoder import Encoder, Prompt
from unmask.encoder.packing import deal, pack_budget, packs_at_once
from unmask.encoder.prompts import DefaultPrompts
from unmask.engine.queue import FairQueue, QueuedPrompt, QueuedRequest
from unmask.engine.recent_vectors import RecentVectors, key_of
from unmask.errors import DeadlineExceeded, EngineError, EngineStopped, InputError, Overloaded

log = logging.getLogger("unmask")

# Below this many characters tokenising costs less than handing it to a thread.
_INLINE_CHARACTERS = 2000

# Less than this says more about overhead than about speed; until then no deadline is held against anybody.
_MEASURED_TOKENS = 256

# Of the measured speed, what deadlines are promised on: the next texts may be longer, the machine busier.
_SAFE_SHARE = 0.75

# Of what can be done before a deadline, what the callers that wait already may fill between them; the rest is for
# whoever has nothing in line yet.
_QUEUED_SHARE = 0.75

# Two models on the same processor would only slow each other down by sharing it within a forward.
_COMPUTE_LOCK = threading.Lock()


class Engine:
    """Batches the work of many callers through one encoder, in a thread of its own.

    Args:
        encoder: the loaded model.
        queue_tokens: tokens that may wait; beyond it requests are refused, not queued.
        pack_tokens: most tokens of one forward; halved when memory runs out.
        cache_bytes: memory for vectors of prompts that were asked for before; 0 for none.

    Attributes:
        reused_prompts: prompts that were answered without a forward.
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
        """Tokenise, off the event loop unless it is too little to matter.

        Args:
            texts: texts, or sequences of the model's own token ids.

        Raises:
            InputError and its kinds, with the index of the input at fault.
        """
        size = sum(len(text) for text in texts)
        if size <= _INLINE_CHARACTERS:
            return self._build(texts, instruction, truncate)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenisers, self._build, texts, instruction, truncate)

    def _build(self, texts: Sequence[str] | Sequence[Sequence[int]], instruction: str, truncate: bool) -> list[Prompt]:
        prompts = self.encoder.prompts
        words = [text for text in texts if isinstance(text, str)]
        if len(words) == len(texts):
            return prompts.build(words, instruction, truncate)
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
        """Vectors of prompts, float32 [n, dim], in their order. All or nothing.

        A prompt that was asked for before, or comes twice, is computed once; a text has one vector.

        Args:
            deadline: `time.monotonic()` by which the caller wants them.
            caller: whose work this is; callers share the model equally. Empty: this request alone.
            use_cache: answer prompts that were computed a moment ago from the cache.

        Raises:
            Overloaded: admitting it would overfill the queue, or miss its deadline or that of somebody admitted
                before; carries `retry_after`.
            DeadlineExceeded: the deadline passed while it waited.
            EngineStopped: the engine is closing.
        """
        if self._recent is None or not use_cache:
            return await self._compute(prompts, deadline, caller)
        vectors = np.empty((len(prompts), self.encoder.dim), dtype=np.float32)
        missing: dict[bytes, list[int]] = {}
        for place, prompt in enumerate(prompts):
            key = key_of(prompt)
            known = self._recent.get(key)
            if known is None:
                missing.setdefault(key, []).append(place)
            else:
                vectors[place] = known
        self.reused_prompts += len(prompts) - len(missing)
        if missing:
            computed = await self._compute([prompts[places[0]] for places in missing.values()], deadline, caller)
            for (key, places), vector in zip(missing.items(), computed, strict=True):
                vectors[places] = vector
                self._recent.put(key, vector)
        return vectors

    async def _compute(self, prompts: Sequence[Prompt], deadline: float | None, caller: str) -> np.ndarray:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
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
            done=lambda error: _call_soon(loop, settle, error),
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
            # Cancelled, timed out or refused: nobody waits any more, so nothing of it may run.
            with self._changed:
                if not request.ended:
                    self._queue.drop(request)
        return request.vectors

    def _admit(self, request: QueuedRequest) -> None:
        if self._stopping:
            raise EngineStopped("the server is shutting down; send the request to another one")
        own = sum(len(prompt.ids) for prompt in request.prompts)
        waiting = self._queue.tokens
        if waiting and waiting + own > self._queue_tokens:
            raise Overloaded(
                f"{waiting} tokens are waiting and {self._queue_tokens} may; try again shortly",
                retry_after=(waiting + own - self._queue_tokens) / (self._safe_rate() or self._queue_tokens),
            )
        rate = self._safe_rate()
        if rate is None or not waiting + self._in_flight:
            return
        now = time.monotonic()
        late = self._queue.lateness(own, request.deadline, now=now, rate=rate, running=self._in_flight)
        if late > 0:
            raise Overloaded(
                f"{waiting + self._in_flight} tokens are ahead, too many for all to be done by their deadlines",
                retry_after=late,
            )
        held = self._queue.queued_tokens(request.caller)
        if held:
            share = _QUEUED_SHARE * rate * (request.deadline - now) / self._queue.num_callers()
            if held + own > share:
                raise Overloaded(
                    f"{held} tokens of this caller are in line already, and {share:.0f} may be: others wait as well",
                    retry_after=(held + own - share) * self._queue.num_callers() / rate,
                )

    def _safe_rate(self) -> float | None:
        """Tokens per second that deadlines can count on, once something was measured."""
        return None if self.tokens_per_second is None else _SAFE_SHARE * self.tokens_per_second

    def waiting_tokens(self) -> int:
        """Tokens in line and in the forward that is running."""
        with self._changed:
            return self._queue.tokens + self._in_flight

    def close(self, grace: float = 30.0) -> None:
        """Refuse new work, finish what was accepted (for up to `grace` seconds), end the thread."""
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
        ended = time.perf_counter()
        while True:
            with self._changed:
                while not len(self._queue) and not self._stopping:
                    self._changed.wait()
                    ended = time.perf_counter()
                if not len(self._queue):
                    return
                now = time.monotonic()
                late = self._queue.expired(now)
                for request in late:
                    self._queue.drop(request)
                packs = self._take_packs(now)
                self._in_flight = sum(sequence.length for sequences in packs for sequence in sequences)
            for request in late:
                request.done(DeadlineExceeded("the deadline passed before the vectors were ready"))
            if packs:
                with _COMPUTE_LOCK:
                    self.encoder.each_pack(self._run_pack, packs)
                # From the end of the forward before: what lies between two of them delays whoever waits as well.
                began, ended = ended, time.perf_counter()
                self._measure(self._in_flight, ended - began)
            with self._changed:
                self._in_flight = 0

    def _take_packs(self, now: float) -> list[list[QueuedPrompt]]:
        """What is computed next, in packs that end at about the same time.

        A forward ends with its longest pack, and what was promised to those in it counts on the speed of all cores.
        """
        waiting, device = self._queue.tokens, self.encoder.device
        count = packs_at_once(waiting, device)
        budget = min(self._pack_tokens, pack_budget(waiting, device))
        chosen = self._queue.take(count * budget, now, rate=self._safe_rate())
        return [[chosen[i] for i in dealt] for dealt in deal([sequence.length for sequence in chosen], count)]

    def _run_pack(self, sequences: list[QueuedPrompt]) -> None:
        """One forward, and its vectors to those who asked. Never raises: the thread must live on for the others."""
        try:
            vectors = self.encoder.forward_pack([sequence.prompt for sequence in sequences])
        except Exception as error:
            if not _out_of_memory(error) or len(sequences) == 1:
                log.exception("a forward of %d sequences failed", len(sequences))
                self._fail(sequences, EngineError("the model failed on this request"))
                return
            self._pack_tokens = max(256, min(self._pack_tokens, sum(s.length for s in sequences)) // 2)
            log.warning("out of memory: packs are now at most %d tokens", self._pack_tokens)
            half = len(sequences) // 2
            self._run_pack(sequences[:half])
            self._run_pack(sequences[half:])
            return
        finite = [bool(np.isfinite(vector).all()) for vector in vectors]
        self._fail(
            [sequence for sequence, good in zip(sequences, finite, strict=True) if not good],
            EngineError("the model produced a vector that is not finite; its precision may be too low"),
        )
        for sequence, vector, good in zip(sequences, vectors, finite, strict=True):
            if good:
                self._deliver(sequence, vector)

    def _deliver(self, sequence: QueuedPrompt, vector: np.ndarray) -> None:
        request = sequence.request
        request.vectors[sequence.index] = vector
        with self._changed:
            request.unfinished -= 1
            complete = request.unfinished == 0 and not request.ended
            request.ended = request.ended or complete
        if complete:
            request.done(None)

    def _fail(self, sequences: Sequence[QueuedPrompt], error: BaseException) -> None:
        for request in {id(sequence.request): sequence.request for sequence in sequences}.values():
            with self._changed:
                wanted = not request.ended
                self._queue.drop(request)
            if wanted:
                request.done(error)

    def _measure(self, tokens: int, seconds: float) -> None:
        if tokens < _MEASURED_TOKENS:
            return
        rate = tokens / max(seconds, 1e-6)
        known = self.tokens_per_second
        self.tokens_per_second = rate if known is None else 0.8 * known + 0.2 * rate


def _call_soon(loop: asyncio.AbstractEventLoop, settle, error: BaseException | None) -> None:
    # The caller's loop may have closed while its work was running; then there is nobody to tell.
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle, error)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
