"""`ModelRoute`: from the texts of one request to their vectors, whoever computes them."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from unmask.catalogue import Record
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.conformance import PrecisionClass
from unmask.conformance.references import space_precisions, vector_space
from unmask.encoder import Prompt
from unmask.engine import Engine
from unmask.errors import NoConformingProvider
from unmask.router.embedding_work import LOCAL, EmbeddingWork, RoutedVectors
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.pool import ProviderPool
from unmask.router.served_model import ServedModel

# Texts of fewer characters are tokenised faster than they are handed to a thread.
_INLINE_CHARACTERS = 2000


@dataclass(frozen=True, eq=False)
class ModelRoute:
    """The way of one request. What it says of the model holds for this engine, although another may replace it.

    Attributes:
        record: of the model.
        precision: of the model's vectors here: the engine's, or the one that it will be loaded in.
        engine: this process's own engine; None where the model is not loaded and providers answer.
        endpoints: its providers; None for none.
        pool: of the providers; None for a server without any.
    """

    record: Record
    precision: PrecisionClass
    engine: Engine | None
    endpoints: ModelEndpoints | None
    pool: ProviderPool | None

    @property
    def dim(self) -> int:
        """Length of a vector."""
        if self.engine is not None:
            return self.engine.encoder.dim
        assert self.endpoints is not None and self.endpoints.references is not None  # a provider is admitted
        return self.endpoints.references.dim

    def lease(self) -> AbstractContextManager[None]:
        """Keep the engine open until the request is answered, for it may be replaced meanwhile."""
        return nullcontext() if self.engine is None else self.engine.lease()

    async def prepare(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, instruction: str, truncate: bool
    ) -> list[Prompt]:
        """Tokenise texts with the model's own tokenizer, so that tokens are counted before anything is sent.

        Raises:
            InputError and its subclasses, with the index of the input.
        """
        if self.engine is not None:
            return await self.engine.prepare(texts, instruction=instruction, truncate=truncate)
        assert self.endpoints is not None and self.endpoints.prompts is not None
        strings = [text for text in texts if isinstance(text, str)]
        build = self.endpoints.prompts.build
        if sum(map(len, strings)) <= _INLINE_CHARACTERS:
            return build(strings, instruction, truncate)
        return await asyncio.to_thread(build, strings, instruction, truncate)

    async def run(self, work: EmbeddingWork) -> RoutedVectors:
        """Compute the vectors.

        Raises:
            NoProvider, NoConformingProvider, ProviderRefused: see `attempts.answer`.
            Overloaded, DeadlineExceeded, EngineStopped: see `Engine.run`.
        """
        if self.pool is None or self.endpoints is None:
            assert self.engine is not None  # `find_route` gives one or the other
            vectors = await self.engine.run(work.prompts, deadline=work.deadline, caller=work.share)
            return RoutedVectors(vectors, LOCAL, 1)
        return await self.pool.answer(self.endpoints, self.engine, work)

    def headers(self, routed: RoutedVectors) -> dict[str, str]:
        """Return the headers that say who answered, and in which vector space the vectors are."""
        name = routed.provider if self.pool is None else self.pool.public_names.public_name(routed.provider)
        headers = {"x-unmask-provider": name, "x-unmask-attempts": str(routed.attempts)}
        endpoint = routed.endpoint
        if endpoint is None:
            precision = self.precision
        else:
            precision = endpoint.precision or "exact"
            worst = endpoint.conformance.worst if endpoint.conformance is not None else 1.0
            headers["x-unmask-conformance"] = f"{precision};worst={worst:.1e};checked={int(endpoint.passed_at)}"
        if space := self.vector_space(precision):
            headers["x-unmask-vector-space"] = space
        return headers

    def vector_space(self, precision: PrecisionClass) -> str | None:
        """Return the id of the vector space in a precision; None while nothing of the model is known."""
        references = self.endpoints.references if self.endpoints is not None else None
        if references is not None:
            return references.vector_space(precision)
        return _space(self.record, precision)


def space_of(served: ServedModel) -> str | None:
    """Return the id of a model's vector space; None while its revision or its precision is not known.

    For a model that providers alone answer for, it is that of exact vectors; None until its references are read.
    """
    return _space(served.record, served.precision_class)


def _space(record: Record, precision: PrecisionClass | None) -> str | None:
    if record.revision is None or record.pooling is None or precision is None:
        return None
    return vector_space(record.id, record.revision, record.pooling, record.compat, precision)


async def find_tokenizer(served: ServedModel, pool: ProviderPool | None) -> TextTokenizer:
    """Return a model's tokenizer: the one that its providers' texts are counted with, or the engine's.

    Raises:
        ModelLoading, CheckpointError, NoConformingProvider: as `ServedModel.engine`.
    """
    endpoints = pool.of_model(served.record.id) if pool is not None else None
    if endpoints is not None and endpoints.tokenizer is not None:
        return endpoints.tokenizer
    return (await served.engine()).encoder.checkpoint.tokenizer


async def find_route(
    served: ServedModel,
    pool: ProviderPool | None,
    wait: float,
    precisions: Sequence[PrecisionClass] = (),
    *,
    local: bool = False,
) -> ModelRoute:
    """Return the way of a request. A model that is not loaded is answered for by its providers meanwhile.

    Those of another vector space than the one that the engine will have do not, unless the caller asks for theirs:
    otherwise the vectors from before and after loading could not be mixed.

    Args:
        served: the model.
        pool: the providers; None for none.
        wait: seconds that the caller waits for a model that is being loaded.
        precisions: classes that the caller asks for, beyond those of the model's space.
        local: only the engine can do what the request needs.

    Raises:
        ModelLoading, CheckpointError: as `ServedModel.engine`.
        NoConformingProvider: the model is never loaded here, and no provider is admitted.
    """
    endpoints = pool.of_model(served.record.id) if pool is not None else None
    if endpoints is None or pool is None:
        return _route(served, await served.engine(wait), None, None)
    if pool.is_remote_only(served.record.id):
        if local:
            return _route(served, await served.engine(), endpoints, pool)  # which it refuses
        if not endpoints.any_admitted():
            message = "no provider of this model has been found to give the right vectors: try again later"
            refusal = NoConformingProvider(message, retry_after=endpoints.checked_in(time.monotonic()))
            endpoints.totals.add_refusal(refusal)
            raise refusal
        return _route(served, None, endpoints, pool)
    may_answer = (*space_precisions(served.precision_class or "exact"), *precisions)
    if served.state != "ready" and endpoints.any_admitted(may_answer) and not local:
        served.load_in_background()
        return _route(served, None, endpoints, pool)
    return _route(served, await served.engine(wait), endpoints, pool)


def _route(
    served: ServedModel, engine: Engine | None, endpoints: ModelEndpoints | None, pool: ProviderPool | None
) -> ModelRoute:
    precision = served.precision_class
    assert precision is not None  # it is loaded, or has providers
    return ModelRoute(served.record, precision, engine, endpoints, pool)
