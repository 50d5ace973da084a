"""`SplitRequest`: all texts of a request at one endpoint, in HTTP requests of the size that it takes."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from unmask.router.embedding_work import EmbeddingWork
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.places import Place
from unmask.router.signals import AttemptFailed
from unmask.router.wire import ask, require_vectors


@dataclass(eq=False)
class SplitRequest:
    """One attempt at one endpoint: whole or not at all.

    Each part needs a place, so that all callers together never send more at a time than the endpoint takes.

    Attributes:
        endpoint: to ask.
        work: the request, which the endpoint can carry.
        dim: length of the model's vectors.
        until: `time.monotonic()` of its end.
        waited: seconds for which its parts have waited for a place. They are not the provider's fault.
    """

    endpoint: ProviderEndpoint
    work: EmbeddingWork
    dim: int
    until: float
    waited: float = 0.0
    _counts: list[int | None] = field(init=False, default_factory=list)

    async def send(self, place: Place) -> tuple[np.ndarray, int | None]:
        """Return the vectors, and the tokens by the provider's count; None if it did not say.

        Args:
            place: of the first part; the others get theirs as they become free.

        Raises:
            AttemptFailed: a part has no answer, or not in time.
        """
        texts, size = self.work.texts, self.endpoint.provider.inputs_per_request(self.endpoint.model)
        assert texts is not None  # the endpoint is able to carry the request
        parts = [texts[first : first + size] for first in range(0, len(texts), size)]
        if len(parts) == 1:
            return await self._part(parts[0]), self._counts[0]
        vectors: dict[int, np.ndarray] = {}
        waiting = iter(enumerate(parts))
        workers = min(len(parts), self.endpoint.load.limit)
        tasks = [
            asyncio.ensure_future(self._send_parts(waiting, vectors, None if worker else place))
            for worker in range(workers)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        counts = [count for count in self._counts if count is not None]
        joined = np.concatenate([vectors[index] for index in range(len(parts))])
        return joined, sum(counts) if len(counts) == len(parts) else None

    async def _send_parts(
        self, parts: Iterator[tuple[int, Sequence[str]]], vectors: dict[int, np.ndarray], place: Place | None
    ) -> None:
        """Send one part after the other, as long as there are any, and add their vectors by number."""
        for index, texts in parts:
            place = place or await self._next_place()
            try:
                vectors[index] = await self._part(texts)
            finally:
                place.release()
            place = None

    async def _next_place(self) -> Place:
        started = time.monotonic()
        place = await self.endpoint.places.obtain(self.work.share, self.until)
        self.waited += time.monotonic() - started
        if place is None:
            raise AttemptFailed(self.endpoint.provider.name, "timeout", "its places were taken by other requests")
        return place

    async def _part(self, texts: Sequence[str]) -> np.ndarray:
        endpoint = self.endpoint
        received = await ask(
            endpoint.client,
            endpoint.model,
            texts,
            instruction=self.work.instruction,
            dim=self.dim,
            seconds=max(0.001, self.until - time.monotonic()),
        )
        self._counts.append(received.prompt_tokens)
        endpoint.compare_origin(received.origin, time.monotonic())
        is_normalised = endpoint.conformance is not None and endpoint.conformance.normalised
        return require_vectors(received, self.dim, endpoint.provider.name, has_unit_length=is_normalised)
