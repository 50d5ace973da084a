"""Full and light runs of the canaries at one provider."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.conformance import (
    Answer,
    Finding,
    References,
    examine,
    full_run,
    light_distance,
    light_rows,
    load_references,
    read_references,
    require_same_model,
    worst_limit,
)
from unmask.encoder import LoadOptions
from unmask.encoder.loading import prompts_for
from unmask.encoder.prompts import PromptBuilder
from unmask.errors import CheckpointError, UsageError
from unmask.router.providers import ProviderModel, Providers
from unmask.router.request_history import Outcome
from unmask.router.signals import AttemptFailed
from unmask.router.wire import ask, require_vectors

if TYPE_CHECKING:
    from unmask.router.outbound import ProviderClient

_REQUEST_S = 60.0  # for one request of a full run
_TOKENS_PER_SECOND = 500  # slower than this, a request of many texts is taken for lost
_LIGHT_S = 10.0


# Told of every request of a run: outcome, tokens by our count, the answer if there is one, seconds.
NoteProbe = Callable[[Outcome, int, Answer | None, float], None]

# Path of a file of references, and the time of its last change in nanoseconds.
ReferencesStamp = tuple[Path, int]


async def full_check(
    client: "ProviderClient",
    model: ProviderModel,
    references: References,
    note: NoteProbe | None = None,
    draw: random.Random | None = None,
) -> Finding:
    """Ask a provider for all canaries and judge its answers.

    Args:
        client: of the provider.
        model: the model there.
        references: of the model.
        note: told of every request, for the books.
        draw: source of chance; None for one of its own.

    Raises:
        AttemptFailed: it did not answer, so nothing is known about its vectors.
    """
    provider = client.provider

    async def send(texts: Sequence[str], instruction: str) -> Answer:
        seconds = _REQUEST_S + sum(map(len, texts)) / _TOKENS_PER_SECOND
        with _noted(references, texts, instruction, note) as answers:
            answer = await ask(client, model, texts, instruction=instruction, dim=references.dim, seconds=seconds)
            answers.append(answer)
        return answer

    try:
        answers = await full_run(
            send,
            references,
            draw or random.Random(),
            max_inputs=provider.inputs_per_request(model),
            max_tokens=model.max_tokens,
            instructions=provider.takes_instructions,
            control_tokens=not model.reads_control_tokens,
        )
    except AttemptFailed as failure:
        if failure.signal != "malformed":
            raise
        return Finding.unusable(f"gives no usable answer: {failure.detail}")
    return examine(references, answers, model.precision_class)


@contextmanager
def _noted(
    references: References, texts: Sequence[str], instruction: str, note: NoteProbe | None
) -> Iterator[list[Answer]]:
    """Note a request for canaries, whatever becomes of it. The block appends its answer to the list."""
    started, unpublished = time.monotonic(), references.unpublished
    answers: list[Answer] = []
    outcome: Outcome = "cancelled"  # unless something else happens
    try:
        yield answers
        outcome = "answered"
    except AttemptFailed as failure:
        outcome = failure.signal
        raise
    finally:
        if note is not None:
            lengths = {(text, ""): n for text, n in zip(unpublished.texts, unpublished.num_tokens, strict=True)}
            canaries = [(canary.text, canary.instruction) for canary in references.canaries]
            lengths |= zip(canaries, references.num_tokens, strict=True)
            tokens = sum(int(lengths[text, instruction]) for text in texts)
            note(outcome, tokens, answers[0] if answers else None, time.monotonic() - started)


async def light_check(
    client: "ProviderClient",
    model: ProviderModel,
    references: References,
    draw: random.Random,
    note: NoteProbe | None = None,
) -> float:
    """Ask a provider for three unpublished canaries, and return the largest 1 - cosine.

    Args:
        client: of the provider.
        model: the model there.
        references: of the model.
        draw: source of chance.
        note: told of the request, for the books.

    Raises:
        AttemptFailed: it did not answer. "malformed" is a failure of conformance, everything else one of health.
    """
    rows = light_rows(references, draw, max_tokens=model.max_tokens)
    texts = [references.unpublished.texts[row] for row in rows]
    with _noted(references, texts, "", note) as answers:
        answer = await ask(client, model, texts, dim=references.dim, seconds=_LIGHT_S)
        answers.append(answer)
    vectors = require_vectors(answer, references.dim, client.provider.name)
    return light_distance(references, rows, vectors)


def light_limit(model: ProviderModel, references: References) -> float:
    """Return the largest 1 - cosine that a light run of a provider may have."""
    return worst_limit(references, model.precision_class)


class ModelSource(NamedTuple):
    """The place of a model's files on this machine, and its text handling."""

    weights: str
    compat: Literal["default", "reference"] = "default"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a full run at a provider.

    Attributes:
        provider, model: names.
        passed: its vectors are the model's.
        sentence: the fault with its subject, or why there was no answer; "" if it passed.
        finding: None if it did not answer.
    """

    provider: str
    model: str
    passed: bool
    sentence: str
    finding: Finding | None


async def check_all(
    providers: Providers, sources: Mapping[str, ModelSource], report_progress: Callable[[str], None]
) -> list[CheckResult]:
    """Make a full run for every model of every provider, one after the other.

    Args:
        providers: to check.
        sources: model id -> its weights; a model that is not in it is loaded by its id.
        report_progress: gets a line before each long step.

    Raises:
        CheckpointError: a model's weights are not here and the file of providers names no references, so there are no
            right vectors to compare with.
        UsageError: a key or a certificate authority cannot be read.
    """
    from unmask.router.outbound import ProviderClient  # aiohttp takes a fifth of a second that others can do without

    references: dict[str, References] = {}
    results = []
    for provider in providers.providers:
        client = ProviderClient(provider)
        try:
            for model in provider.models:
                if model.id not in references:
                    report_progress(f"the right vectors of {model.id}: computed, or read from a file")
                    source, file = sources.get(model.id, ModelSource(model.id)), providers.references_file(model.id)
                    references[model.id] = await asyncio.to_thread(references_of, model.id, source, file)
                report_progress(
                    f"{provider.name} is asked for {len(references[model.id].canaries)} texts of {model.id}"
                )
                results.append(await _check_one(client, model, references[model.id]))
        finally:
            await client.close()
    return results


def references_of(model: str, source: ModelSource, file: Path | None = None) -> References:
    """Return the references of a model: those of a file, or computed from its weights once and stored.

    Raises:
        CheckpointError, StorageError: as `load_references`; without weights, the message says how to get a file.
    """
    if file is not None:
        return read_references(file)
    try:
        revision = open_checkpoint(source.weights).revision
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Without weights, let 'unmask providers references {model} --output FILE' write the right "
            "vectors on a machine that has them, and name the file under [references] in the file of providers"
        ) from error
    return load_references(source.weights, model=model, revision=revision, compat=source.compat)


class RemoteModel(NamedTuple):
    """The parts of a model that providers answer for, which need no weights.

    Attributes:
        checkpoint: its files, opened without weights.
        prompts: its text handling.
        references: its right vectors.
    """

    checkpoint: Checkpoint
    prompts: PromptBuilder
    references: References


def open_remote_model(model: str, source: ModelSource, file: Path | None) -> RemoteModel:
    """Open a model that providers answer for.

    Args:
        model: its id.
        source: folder of its tokenizer and configuration; with its weights, if there is no `file`.
        file: its references; None to compute them.

    Raises:
        CheckpointError, StorageError: as `references_of`, or the references are of another model than the tokenizer.
        ModelNotFound, UsageError: as `open_checkpoint` and `prompts_for`.
    """
    checkpoint = open_checkpoint(source.weights, weights=False)
    pooling, max_tokens, prompts = prompts_for(checkpoint, LoadOptions(compat=source.compat))
    references = references_of(model, source, file)
    if file is not None:
        require_same_model(references, prompts, pooling=pooling, compat=source.compat, max_tokens=max_tokens)
    return RemoteModel(checkpoint, prompts, references)


async def _check_one(client: "ProviderClient", model: ProviderModel, references: References) -> CheckResult:
    name = client.provider.name
    try:
        finding = await full_check(client, model, references)
    except AttemptFailed as failure:
        return CheckResult(name, model.id, False, str(failure), None)
    sentence = f"{name} {finding.fault}" if finding.fault else ""
    return CheckResult(name, model.id, finding.passed, sentence, finding)


def references_stamp(file: Path | None) -> ReferencesStamp | None:
    """Return path and time of change of a file of references, to notice a new one; None for none.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return None if file is None else (file, file.stat().st_mtime_ns)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
