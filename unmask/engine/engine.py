"""`Engine`: batches the requests of many callers through one model, computed by one or several hands."""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from unmask.encoder import Encoder, Prompt
from unmask.encoder.packing import balance
from unmask.encoder.prompts import DefaultPrompts
from unmask.encoder.remote_encoder import RemoteEncoder
from unmask.engine.hand import PACK_TOKENS, Hand, HandLost, LocalHand, PackVectors
from unmask.engine.hand_thread import HandFigures, HandThread
from unmask.engine.queue import FairQueue, QueuedPrompt, QueuedRequest
from unmask.engine.recent_vectors import RecentVectors, cache_key
from unmask.errors import DeadlineExceeded, EngineError, EngineStopped, InputError, Overloaded

log = logging.getLogger("unmask")

# Texts of fewer characters are tokenised faster than they are handed to a thread.
_INLINE_CHARACTERS = 2000

# Share of the measured speed that admission counts on: the next texts may be longer, and the machine busier.
_SAFE_SHARE = 0.75

# Share of the tokens computable before a deadline that callers with queued tokens may fill. The rest is reserved for
# callers with an empty queue.
_QUEUED_SHARE = 0.75

# Fewer waiting tokens go to one hand whole; more are shared among those that are free.
_MIN_SHARED_TOKENS = 256

# Forwards in which a prompt may lose its hand; in the last one it is alone, so that it takes no other with it.
_MAX_LOSSES = 3

# Seconds without work after which a hand is checked.
_CHECK_S = 10.0

# The engine uses as many hands as can compute the waiting tokens within _GROW_S seconds. After _SHRINK_S seconds in
# which at least one of them was idle at every moment, it uses one hand less.
_GROW_S, _SHRINK_S = 5.0, 300.0
# Seconds between two looks of an unused hand at whether it is needed again.
_PARKED_S = 0.2

# Seconds that a thread may take to see that its replica is closed.
_CLOSED_HAND_S = 3.0


class Engine:
    """Batches the requests of many callers through one model, with a thread for each of its hands.

    Args:
        encoder: the loaded model, or the description of one that is loaded elsewhere.
        queue_tokens: most tokens in the queue; requests beyond it are refused.
        pack_tokens: most tokens of one forward of this process; halved when memory runs out.
        cache_bytes: memory for vectors of recent prompts; 0 for no cache.
        hands: what computes; None for this process. The engine closes them.
        least_hands: number of hands that are always used, others only while many tokens wait; None for all.

    Attributes:
        reused_prompts: number of prompts answered without a forward.
        leases: number of requests that may still give it work.
    """

    def __init__(
        self,
        encoder: Encoder | RemoteEncoder,
        *,
        queue_tokens: int = 262_144,
        pack_tokens: int = PACK_TOKENS,
        cache_bytes: int = 0,
        hands: Sequence[Hand] | None = None,
        least_hands: int | None = None,
    ) -> None:
        if hands is None:
            assert isinstance(encoder, Encoder), "a model that is loaded elsewhere needs hands"
            hands = [LocalHand(encoder, pack_tokens)]
        self.encoder = encoder
        self.reused_prompts, self.leases = 0, 0
        self._recent = RecentVectors(cache_bytes) if cache_bytes else None
        self._queue_tokens = queue_tokens
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._idle = 0  # hands that wait for work
        self._least = self._active = len(hands) if least_hands is None else least_hands
        self._full_at = time.monotonic()  # time at which no active hand was idle
        self._stopping = False
        self._stop_error: EngineError | None = None
        self._anonymous = itertools.count()
        self._tokenisers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="unmask-tokenise")
        self._hand_threads = [HandThread(hand, number) for number, hand in enumerate(hands)]
        for hand_thread in self._hand_threads:
            name = f"unmask-engine-{encoder.name}-{hand_thread.hand.name}"
            hand_thread.thread = threading.Thread(target=self._work, args=(hand_thread,), name=name, daemon=True)
            hand_thread.thread.start()

    @property
    def tokens_per_second(self) -> float | None:
        """Return the measured speed of all hands that can compute now; None until it is known of one."""
        rates = (each.rate or 0.0 for each in self._hand_threads if each.hand.state == "ready")
        return sum(rates) or None

    @property
    def has_replicas(self) -> bool:
        """True if other processes compute."""
        return not isinstance(self.encoder, Encoder)

    def hands(self) -> list[HandFigures]:
        """Return the figures of all hands."""
        return [hand_thread.figures() for hand_thread in self._hand_threads]

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the engine open until a request has its answer: another may take its place meanwhile."""
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1

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
            self._grow()
            self._changed.notify()
        try:
            await asyncio.wait_for(future, None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise DeadlineExceeded(time.monotonic() - request.arrived) from error
        finally:
            # Cancelled, timed out or refused: the caller is gone, so none of its prompts may run.
            with self._changed:
                if not request.ended:
                    self._queue.drop(request)
        return request.vectors

    def _admit(self, request: QueuedRequest) -> None:
        """Raise if the request cannot be served in time, or would make an admitted one late."""
        if self._stopping:
            raise self._stop_error or EngineStopped("the server is shutting down; send the request to another one")
        new_tokens = sum(len(prompt.ids) for prompt in request.prompts)
        waiting = self._queue.tokens
        if waiting and waiting + new_tokens > self._queue_tokens:
            raise Overloaded(
                f"{waiting} tokens are waiting and {self._queue_tokens} may; try again shortly",
                retry_after=(waiting + new_tokens - self._queue_tokens) / (self._safe_rate() or self._queue_tokens),
            )
        rate = self._safe_rate()
        running = self._running_tokens()
        if rate is None or not waiting + running:
            return
        now = time.monotonic()
        late = self._queue.lateness(new_tokens, request.deadline, now=now, rate=rate, running=running)
        if late > 0:
            raise Overloaded(
                f"{waiting + running} tokens are ahead, too many for all to be done by their deadlines",
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
        rate = self.tokens_per_second
        return None if rate is None else _SAFE_SHARE * rate

    def _running_tokens(self) -> int:
        return sum(hand_thread.tokens for hand_thread in self._hand_threads)

    def waiting_tokens(self) -> int:
        """Return the number of tokens in the queue and in the running forwards."""
        with self._changed:
            return self._queue.tokens + self._running_tokens()

    def close(self, grace: float = 30.0, error: EngineError | None = None) -> None:
        """Refuse new requests, finish accepted ones for up to `grace` seconds, and end the threads and the hands.

        Args:
            error: what refused and unfinished requests get; by default that the server shuts down.
        """
        end = time.monotonic() + grace
        with self._changed:
            self._stopping, self._stop_error = True, error
            self._changed.notify_all()
        for hand_thread in self._hand_threads:
            if hand_thread.thread is not None:
                hand_thread.thread.join(max(0.0, end - time.monotonic()))
        with self._changed:
            running = [queued.request for hand_thread in self._hand_threads for queued in hand_thread.taken]
            abandoned = {id(request): request for request in [*self._queue.requests(), *running] if not request.ended}
            for request in abandoned.values():
                self._queue.drop(request)
        for request in abandoned.values():
            request.done(error or EngineStopped("the server shut down before this request was done"))
        for hand_thread in self._hand_threads:
            hand_thread.hand.close()
        if self.has_replicas:  # a closed replica gives up its forward
            for hand_thread in self._hand_threads:
                if hand_thread.thread is not None:
                    hand_thread.thread.join(_CLOSED_HAND_S)
        self._tokenisers.shutdown(wait=False, cancel_futures=True)

    def _work(self, hand_thread: HandThread) -> None:
        hand_thread.last_end = time.perf_counter()
        while not self._is_over():
            if hand_thread.number >= self._active:
                hand_thread.hand.park()
                time.sleep(_PARKED_S)
                continue
            if not hand_thread.hand.restore():
                continue
            self._shrink()
            if not self._wait_for_work(hand_thread):
                hand_thread.hand.check()
                continue
            packs = self._next_forward(hand_thread)
            if packs:
                self._run_forward(hand_thread, packs)

    def _grow(self) -> None:
        """Use as many hands as the waiting tokens need, if their speed is known."""
        rates = [hand_thread.rate for hand_thread in self._hand_threads if hand_thread.rate is not None]
        if rates and self._active < len(self._hand_threads):
            seconds_of_one = (self._queue.tokens + self._running_tokens()) * len(rates) / sum(rates)
            self._active = min(len(self._hand_threads), max(self._active, math.ceil(seconds_of_one / _GROW_S)))

    def _shrink(self) -> None:
        """Use a hand less, if some were idle all the time for long."""
        with self._changed:
            now = time.monotonic()
            if not self._idle:
                self._full_at = now
            elif self._active > self._least and now - self._full_at > _SHRINK_S:
                self._active, self._full_at = self._active - 1, now

    def _is_over(self) -> bool:
        """Return true if the engine stops and nothing is left: neither in the queue nor in a hand that may be lost."""
        with self._changed:
            return self._stopping and not len(self._queue) and not self._running_tokens()

    def _wait_for_work(self, hand_thread: HandThread) -> bool:
        """Wait until something changes, unless prompts are in the queue. Return false if nothing did for a while."""
        with self._changed:
            if len(self._queue) or self._is_over():
                return True
            self._idle += 1
            try:
                return self._changed.wait(_CHECK_S)
            finally:
                self._idle -= 1
                hand_thread.last_end = time.perf_counter()

    def _next_forward(self, hand_thread: HandThread) -> list[list[QueuedPrompt]]:
        """Take the packs of the next forward from the queue, and end the requests that are too late for one."""
        with self._changed:
            now = time.monotonic()
            expired = self._queue.expired(now)
            for request in expired:
                self._queue.drop(request)
            packs = self._take_packs(hand_thread, now)
            hand_thread.taken = [queued for pack in packs for queued in pack]
            if len(self._queue):
                self._changed.notify()  # there is work for another hand as well
        for request in expired:
            request.done(DeadlineExceeded(now - request.arrived))
        return packs

    def _take_packs(self, hand_thread: HandThread, now: float) -> list[list[QueuedPrompt]]:
        """Take the next prompts from the queue, as packs that end at about the same time.

        A forward ends with its longest pack, and admission counts on the speed of all cores.
        """
        waiting, rate = self._queue.tokens, self.tokens_per_second
        if waiting > _MIN_SHARED_TOKENS:
            waiting = -(-waiting // (1 + self._idle))
        count, budget = hand_thread.hand.sizes(waiting)
        share = 1.0 if rate is None or hand_thread.rate is None else min(1.0, hand_thread.rate / rate)
        running = self._running_tokens()
        prompts = self._queue.take(count * budget, now, rate=self._safe_rate(), running=running, share=share)
        suspects = [queued for queued in prompts if queued.times_lost == _MAX_LOSSES - 1]
        if suspects:
            self._queue.put_back([queued for queued in prompts if queued is not suspects[0]])
            prompts = suspects[:1]
        return [[prompts[i] for i in rows] for rows in balance([prompt.length for prompt in prompts], count)]

    def _run_forward(self, hand_thread: HandThread, packs: list[list[QueuedPrompt]]) -> None:
        """Let the hand compute packs. Never raises: the thread must live on for other requests."""
        tokens, failures = hand_thread.tokens, list[object]()

        def deliver(number: int, outcome: PackVectors) -> None:
            failures.extend(outcome.errors)
            self._deliver(packs[number], outcome)

        try:
            hand_thread.hand.forward(
                [[queued.prompt for queued in pack] for pack in packs], hand_thread.seconds_until_late(), deliver
            )
        except HandLost as lost:
            self._take_back(hand_thread, lost.is_late)
            return
        except Exception as error:
            failures.append(error)
            log.exception("a forward of %d tokens failed", tokens)
            self._fail(hand_thread.taken, EngineError("the model failed on this request"))
        # Measured from the end of the last forward: the gap between two forwards delays callers as well.
        start, hand_thread.last_end = hand_thread.last_end, time.perf_counter()
        with self._changed:
            hand_thread.end_forward(tokens, hand_thread.last_end - start, is_whole=not failures)
            if self._stopping:
                self._changed.notify_all()

    def _take_back(self, hand_thread: HandThread, is_late: bool) -> None:
        """Queue the prompts of a lost forward again, for whoever is free."""
        failure = EngineError(f"the model failed on this request: {_MAX_LOSSES} replicas ended while they computed it")
        with self._changed:
            taken = hand_thread.lose_forward(is_late)
            self._fail([queued for queued in taken if queued.times_lost >= _MAX_LOSSES], failure)
            self._queue.put_back(taken)
            self._changed.notify_all()

    def _deliver(self, pack: Sequence[QueuedPrompt], outcome: PackVectors) -> None:
        """Take the vectors of a pack. The first answer counts, if a prompt was given to two hands."""
        complete: list[QueuedRequest] = []
        with self._changed:
            for row, queued in enumerate(pack):
                request = queued.request
                if row in outcome.errors or queued.done or request.ended:
                    continue
                request.vectors[queued.index] = outcome.vectors[row]
                queued.done = True
                self._queue.withdraw(queued)
                request.unfinished -= 1
                if request.unfinished == 0:
                    request.ended = True
                    complete.append(request)
        for request in complete:
            request.done(None)
        for row, error in outcome.errors.items():
            if not pack[row].done:
                self._fail([pack[row]], error)

    def _fail(self, prompts: Sequence[QueuedPrompt], error: BaseException) -> None:
        for request in {id(queued.request): queued.request for queued in prompts}.values():
            with self._changed:
                is_awaited = not request.ended
                self._queue.drop(request)
            if is_awaited:
                request.done(error)


def _call_soon(
    loop: asyncio.AbstractEventLoop, resolve: Callable[[BaseException | None], None], error: BaseException | None
) -> None:
    # The caller's event loop may have closed while its prompts were running.
    if not loop.is_closed():
        loop.call_soon_threadsafe(resolve, error)
