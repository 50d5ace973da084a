"""`ProviderPool`: all providers of one process. Admits them by the canaries, watches them, and answers through them."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.accounts.costs import AttemptRecord
from unmask.accounts.usage import day_start
from unmask.conformance import Answer, Finding, References
from unmask.engine import Engine
from unmask.errors import EngineError, UnmaskError, UsageError
from unmask.router.attempts import answer
from unmask.router.checks import (
    ModelSource,
    NoteProbe,
    RemoteModel,
    full_check,
    light_check,
    light_limit,
    open_remote_model,
    references_stamp,
)
from unmask.router.cross_check import cross_check
from unmask.router.daily_cost import DailyCost, today
from unmask.router.embedding_work import EmbeddingWork, RoutedVectors
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.load import MIN_TOKENS
from unmask.router.model_endpoints import BudgetShares, ModelEndpoints
from unmask.router.providers import ProviderModel, Providers, read_providers
from unmask.router.public_names import PublicNames
from unmask.router.request_history import Outcome
from unmask.router.signals import AttemptFailed
from unmask.router.verdicts import CANARIES, Verdict
from unmask.router.watch_intervals import WatchIntervals

if TYPE_CHECKING:
    from unmask.router.outbound import ProviderClient

log = logging.getLogger("unmask")

# Actor of the quarantines that a cross-check orders. Only a person can end them: the provider answers canary texts
# rightly, so canaries cannot show when its other vectors are right again.
CROSS_CHECK = "cross-check"

READMISSION_RUNS = 2  # full runs in a row that end a quarantine, where no person needs to


@dataclass(eq=False)
class ProviderPool:
    """The providers of one process.

    Args:
        file: the file of providers.
        source_of: model id -> its files on this machine; the references are made of its weights, unless the file of
            providers names some.
        report: stores a verdict of this process and returns its number, see `Verdict`. Runs in a thread.
        take_model: told of a model's id once its files and references were read; raises UnmaskError to refuse them.
        record_attempts: gets the requests for canaries, which are to be paid for as well.
        costs_since: Unix milliseconds -> nano-dollars of each provider's attempts since then, of all processes. Runs in
            a thread. None on a server without accounts.
        intervals: of the canaries.
        draw: source of chance.
        hides_names: callers see letters in place of names.

    Attributes:
        settings: the content of the file.
        public_names: the names that callers see.
        last_reload: number of the last request to read it again that was followed.

    Raises:
        UsageError: the file is wrong.
    """

    file: Path
    source_of: Callable[[str], ModelSource]
    report: Callable[[Verdict], int] = lambda verdict: 0
    take_model: Callable[[str, RemoteModel], None] = lambda id, model: None
    record_attempts: Callable[[Sequence[AttemptRecord]], None] = lambda attempts: None
    costs_since: Callable[[int], Mapping[str, int]] | None = None
    intervals: WatchIntervals = field(default_factory=WatchIntervals)
    draw: random.Random = field(default_factory=random.Random)
    hides_names: bool = False
    settings: Providers = field(init=False)
    public_names: PublicNames = field(init=False, default_factory=PublicNames)
    last_reload: int = field(init=False, default=0)
    _models: dict[str, ModelEndpoints] = field(init=False, default_factory=dict)
    _clients: list["ProviderClient"] = field(init=False, default_factory=list)
    _watches: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _closings: set[asyncio.Task[None]] = field(init=False, default_factory=set)  # of clients from before a reload
    _verdicts: dict[tuple[str, str], Verdict] = field(init=False, default_factory=dict)
    _daily_costs: dict[str, DailyCost] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._take_settings(read_providers(self.file))

    def _take_settings(self, settings: Providers) -> None:
        self.settings = settings
        names = [provider.name for provider in settings.providers]
        self.public_names = PublicNames.of(names, hides=self.hides_names, earlier=self.public_names)

    @property
    def _pace(self) -> WatchIntervals:
        return self.intervals.with_canaries(self.settings.canary_every_s)

    def reload(self) -> None:
        """Read the file again. Requests under way are finished with the providers they began with.

        Raises:
            UsageError: the file is wrong; nothing has changed then.
        """
        settings = read_providers(self.file)
        self._replace(settings)
        self._take_settings(settings)

    def try_reload(self) -> None:
        """Read the file again; log what is wrong with it, and change nothing then."""
        try:
            self.reload()
        except UsageError as error:
            log.error("the providers stay as they were: %s", error)
        else:
            log.info("the providers were read again")

    def take_reload(self, number: int) -> None:
        """Follow a request to read the file again, once."""
        if number > self.last_reload:
            self.last_reload = number
            self.try_reload()

    def start(self) -> None:
        """Begin to watch the providers, in the running event loop. None is used before its canaries were right."""
        self._replace(self.settings)

    def _replace(self, providers: Providers) -> None:
        """Make clients and endpoints of all providers, in place of all earlier ones.

        Raises:
            UsageError: a key or a certificate authority cannot be read; nothing has changed then.
        """
        # Importing aiohttp takes a fifth of a second, and a server without providers does not need it.
        from unmask.router.outbound import ProviderClient

        clients = [ProviderClient(provider) for provider in providers.providers]
        stamps = {id: references_stamp(providers.references_file(id)) for id in providers.references}
        shares = BudgetShares(providers.retry_tokens, providers.hedge_tokens)
        groups: dict[str, list[ProviderEndpoint]] = {}
        for client in clients:
            for model in client.provider.models:
                groups.setdefault(model.id, []).append(self._new_endpoint(client, model))
        self._models = {
            id: self._new_model(id, ModelEndpoints(group, providers.min_margin, stamps.get(id), shares))
            for id, group in groups.items()
        }
        self._restart_watches(providers)
        self._replace_clients(clients)

    def _new_endpoint(self, client: "ProviderClient", model: ProviderModel) -> ProviderEndpoint:
        daily_cost = self._daily_costs.setdefault(client.provider.name, DailyCost())
        return ProviderEndpoint(client, model, random.Random(self.draw.random()), daily_cost)

    def _new_model(self, id: str, model: ModelEndpoints) -> ModelEndpoints:
        """Give a model what is known of its endpoints, which stays as long as its references do."""
        earlier = self._models.get(id)
        if earlier is not None and earlier.references_stamp == model.references_stamp:
            model.inherit(earlier)
        for endpoint in model.endpoints:
            self._keep_admission(endpoint)
        return model

    def _restart_watches(self, providers: Providers) -> None:
        """Watch the models and the costs of the day, in place of all earlier tasks."""
        for task in self._watches:
            task.cancel()
        self._watches = {asyncio.create_task(self._watch_model(id, model)) for id, model in self._models.items()}
        if any(provider.max_cost_per_day is not None for provider in providers.providers):
            self._watches.add(asyncio.create_task(self._watch_costs()))

    def _replace_clients(self, clients: list["ProviderClient"]) -> None:
        """Use other clients, and close the earlier ones once their requests have ended."""
        old, self._clients = self._clients, clients
        for client in old:
            task = asyncio.create_task(client.close_when_idle())
            self._closings.add(task)
            task.add_done_callback(self._closings.discard)

    async def _watch_costs(self) -> None:
        """Keep the day's costs in step with the books, which have those of other processes, until cancelled."""
        while self.costs_since is not None:
            day = today()
            own = {name: cost.own(day) for name, cost in self._daily_costs.items()}
            try:
                booked = await asyncio.to_thread(self.costs_since, day_start(day))
            except UnmaskError as error:
                log.error("what providers cost today cannot be read, so only this process counts: %s", error)
            else:
                for name, cost in self._daily_costs.items():
                    cost.take_books(booked.get(name, 0), own.get(name, 0), day)
            await asyncio.sleep(self._pace.costs)

    def _keep_admission(self, endpoint: ProviderEndpoint) -> None:
        """Quarantine an endpoint that is quarantined already."""
        verdict = self._verdicts.get((endpoint.provider.name, endpoint.model.id))
        if verdict is not None and verdict.is_quarantine:
            endpoint.quarantine(verdict.finding)

    def take_verdicts(self, verdicts: Mapping[tuple[str, str], Verdict]) -> None:
        """Apply verdicts of the operator or of another process. An endpoint that is admitted again gets a full run.

        Verdicts that are older than the known one are left out: they were read before it was stored.

        Args:
            verdicts: (provider, model) -> the last verdict.
        """
        for key, verdict in verdicts.items():
            before = self._verdicts.get(key)
            if before is not None and verdict.number <= before.number:
                continue
            self._verdicts[key] = verdict
            endpoint = self._endpoint(*key)
            if endpoint is None or (before.finding if before else "") == verdict.finding:
                continue
            if verdict.is_quarantine:
                endpoint.quarantine(verdict.finding)
            else:
                endpoint.uncheck()
                endpoint.breaker.close()
            endpoint.wake.set()

    def models(self) -> Mapping[str, ModelEndpoints]:
        """Return the models that have providers, by id."""
        return self._models

    def of_model(self, model: str) -> ModelEndpoints | None:
        """Return the endpoints of a model; None if it has no provider."""
        return self._models.get(model)

    def is_remote_only(self, model: str) -> bool:
        """True if this server never loads the model."""
        return model in self.settings.remote_only

    async def answer(self, model: ModelEndpoints, engine: Engine | None, work: EmbeddingWork) -> RoutedVectors:
        """Embed the inputs of a request, see `attempts.answer`."""
        earlier = len(work.attempts)
        try:
            routed = await answer(model, engine, work, self.draw)
        except EngineError as error:
            model.totals.add_refusal(error)
            raise
        finally:
            model.totals.add_attempts(work.attempts[earlier:])
        endpoint = routed.endpoint
        if endpoint is not None and model.cross_check is None and self.draw.random() < self.settings.cross_check:
            model.cross_check = asyncio.create_task(self._cross_check(model, engine, endpoint))
            model.cross_check.add_done_callback(model.end_cross_check)
        return routed

    async def _cross_check(self, model: ModelEndpoints, engine: Engine | None, first: ProviderEndpoint) -> None:
        """Compare a provider with others on a new text, and take out whoever is wrong."""
        if model.references is None or model.prompts is None:
            return
        others = [
            endpoint
            for endpoint in model.endpoints
            if endpoint is not first and endpoint.is_available(time.monotonic())
        ]
        self.draw.shuffle(others)
        verdicts, attempts = await cross_check([first, *others], engine, model.references, model.prompts, self.draw)
        self.record_attempts(attempts)
        for endpoint in verdicts.wrong_endpoints:
            if endpoint.admission == "admitted":
                fault = "gives a new text another vector than all others do"
                await self._quarantine(endpoint, fault, CROSS_CHECK)
                endpoint.wake.set()
        if verdicts.suspects:
            names = " and ".join(endpoint.provider.name for endpoint in verdicts.suspects)
            log.error("%s give a new text different vectors: none is used until all its canaries are right", names)
        for endpoint in verdicts.suspects:
            if endpoint.admission == "admitted":
                endpoint.uncheck()
                endpoint.wake.set()

    async def close(self) -> None:
        """Stop watching and close all connections."""
        checks = {model.cross_check for model in self._models.values() if model.cross_check is not None}
        tasks = self._watches | self._closings | checks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()

    def _endpoint(self, provider: str, model: str) -> ProviderEndpoint | None:
        group = self._models.get(model)
        endpoints: Sequence[ProviderEndpoint] = group.endpoints if group else ()
        return next((endpoint for endpoint in endpoints if endpoint.provider.name == provider), None)

    async def _watch_model(self, id: str, model: ModelEndpoints) -> None:
        """Make the references of a model, then watch its endpoints until cancelled."""
        while model.references is None:
            file = model.references_stamp[0] if model.references_stamp is not None else None
            try:
                opened = await asyncio.to_thread(open_remote_model, id, self.source_of(id), file)
                self.take_model(id, opened)
            except UnmaskError as error:
                if str(error) != model.problem:
                    log.error("the right vectors of %s are not known, so no provider of it is used: %s", id, error)
                model.problem = str(error)
                await asyncio.sleep(self._pace.busy)
                continue
            model.tokenizer, model.prompts, model.problem = opened.checkpoint.tokenizer, opened.prompts, ""
            model.references = opened.references
        async with asyncio.TaskGroup() as group:
            for endpoint in model.endpoints:
                group.create_task(self._watch_always(endpoint, model.references))

    async def _watch_always(self, endpoint: ProviderEndpoint, references: References) -> None:
        """Watch an endpoint until cancelled. An error of ours takes it out of traffic: nobody is watching it then."""
        while True:
            try:
                await self._watch(endpoint, references)
            except Exception:
                log.exception("%s cannot be watched, so it is not used", endpoint.provider.name)
                if endpoint.admission != "quarantined":
                    endpoint.uncheck()
                await asyncio.sleep(self._pace.busy)

    async def _watch(self, endpoint: ProviderEndpoint, references: References) -> None:
        """Run the canaries of an endpoint when they are due, until cancelled."""
        next_full, checked_at, silent_runs = 0.0, float("inf"), 0
        while True:
            if endpoint.admission == "quarantined":
                endpoint.wake.clear()
                if self._may_readmit(endpoint):
                    await self._try_readmission(endpoint, references)
                else:
                    await endpoint.wake.wait()
                continue
            endpoint.log_state()
            now = time.monotonic()
            if endpoint.full_due or now >= next_full:
                silent_runs = 0 if await self._run_full(endpoint, references) else silent_runs + 1
                now = time.monotonic()
                if silent_runs:
                    next_full = now + min(self._pace.retry * 2 ** (silent_runs - 1), self._pace.idle)
                else:
                    next_full = now + self._pace.full * self.draw.uniform(0.9, 1.1)
                    checked_at = now
            elif endpoint.breaker.probe(now) or now >= checked_at + self._light_interval(endpoint, now):
                if await self._run_light(endpoint, references):
                    await self._name_fault(endpoint, references)
                now = checked_at = time.monotonic()
            next_light = checked_at + self._light_interval(endpoint, now)
            endpoint.run_at = due = min(next_full, next_light, endpoint.breaker.probe_at)
            # An idle endpoint that is used meanwhile is due sooner, so this never sleeps longer than between two checks
            # of a busy one.
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due - now, self._pace.busy))):
                    await endpoint.wake.wait()
            endpoint.wake.clear()

    def _may_readmit(self, endpoint: ProviderEndpoint) -> bool:
        """True if nobody but the canaries took the endpoint out, and the operator lets them take it in again."""
        verdict = self._verdicts.get((endpoint.provider.name, endpoint.model.id))
        return self.settings.readmit == "auto" and verdict is not None and verdict.actor == CANARIES

    async def _try_readmission(self, endpoint: ProviderEndpoint, references: References) -> None:
        """End a quarantine once full runs have passed, one after the other. Returns earlier if one fails."""
        for _ in range(READMISSION_RUNS):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pace.readmit):
                    await endpoint.wake.wait()
            if endpoint.admission != "quarantined" or not self._may_readmit(endpoint):
                return  # the operator was quicker
            endpoint.wake.clear()
            try:
                finding = await full_check(endpoint.client, endpoint.model, references, self._note_of(endpoint))
            except AttemptFailed as failure:
                log.warning("%s for %s: %s", endpoint.provider.name, endpoint.model.id, failure)
                return
            if not finding.passed:
                endpoint.conformance = finding
                return
        if endpoint.admission == "quarantined" and self._may_readmit(endpoint):
            endpoint.uncheck()
            endpoint.breaker.close()
            log.info("%s has passed for %s again", endpoint.provider.name, endpoint.model.id)
            await self._report(Verdict(provider=endpoint.provider.name, model=endpoint.model.id, verdict="admitted"))

    def _light_interval(self, endpoint: ProviderEndpoint, now: float) -> float:
        """Return the seconds between two light runs. To be asked anew each time: traffic may begin at any moment."""
        is_busy = now - endpoint.last_used < self._pace.idle
        return self._pace.busy if is_busy else self._pace.idle

    async def _run_full(self, endpoint: ProviderEndpoint, references: References) -> bool:
        """Admit or quarantine an endpoint by all canaries. Returns False if it did not answer."""
        started = time.monotonic()
        endpoint.full_due = False
        try:
            finding = await full_check(endpoint.client, endpoint.model, references, self._note_of(endpoint))
        except AttemptFailed as failure:
            now = time.monotonic()
            endpoint.failed(failure, MIN_TOKENS, now - started, now, alone=False, of="canaries")
            return False
        now = time.monotonic()
        if endpoint.admission == "quarantined":
            return True  # by the operator or another process, while the canaries were under way
        if finding.passed:
            if endpoint.admission == "unchecked":
                log.info("%s is admitted for %s", endpoint.provider.name, endpoint.model.id)
            endpoint.admit(finding, now - started, now)
            endpoint.breaker.close()
        else:
            endpoint.conformance = finding
            await self._quarantine(endpoint, finding.fault)
        return True

    async def _run_light(self, endpoint: ProviderEndpoint, references: References) -> bool:
        """Run the health check. Returns True if two in a row gave wrong vectors: the endpoint is then quarantined.

        It gets no traffic between the two. If the second one gets no answer, a full run decides.
        """
        endpoint.log_state()  # the breaker may be half open now
        for last in (False, True):
            started, started_at = time.monotonic(), time.time()
            distance = float("inf")
            try:
                note = self._note_of(endpoint)
                distance = await light_check(endpoint.client, endpoint.model, references, self.draw, note)
            except AttemptFailed as failure:
                if failure.signal != "malformed":
                    now = time.monotonic()
                    endpoint.note_silence(failure, MIN_TOKENS, now - started, now)
                    endpoint.full_due |= last
                    return False
            if distance <= light_limit(endpoint.model, references):
                endpoint.pass_light_run(started_at)
                return False
            log.warning("%s for %s: a canary is off by %.1e", endpoint.provider.name, endpoint.model.id, distance)
            if not last:
                endpoint.suspend()
                await asyncio.sleep(self._pace.second)
        if endpoint.admission == "quarantined":
            return False  # by the operator or another process: their verdict stays
        await self._quarantine(endpoint, "gives wrong vectors; a full run is under way")
        return True

    def _note_of(self, endpoint: ProviderEndpoint) -> NoteProbe:
        """Return a function that puts requests for canaries into the books, and looks at who answered."""

        def note(outcome: Outcome, tokens: int, answer: Answer | None, seconds: float) -> None:
            theirs = answer.prompt_tokens if answer is not None else None
            self.record_attempts([endpoint.record(outcome, "probe", tokens, theirs, seconds)])
            if answer is not None:
                endpoint.compare_origin(answer.origin, time.monotonic())

        return note

    async def _name_fault(self, endpoint: ProviderEndpoint, references: References) -> None:
        """Make a full run at an endpoint that was just quarantined, to say why."""
        try:
            finding = await full_check(endpoint.client, endpoint.model, references, self._note_of(endpoint))
        except AttemptFailed as failure:
            finding = Finding.unusable(f"gave wrong vectors, then no answer: {failure.detail}")
        if finding.passed:
            finding = Finding.unusable("gave wrong vectors in two light runs, and right ones afterwards")
        endpoint.conformance = finding
        verdict = self._verdicts[endpoint.provider.name, endpoint.model.id]
        if verdict.is_quarantine and verdict.actor == CANARIES:
            await self._quarantine(endpoint, finding.fault)

    async def _quarantine(self, endpoint: ProviderEndpoint, fault: str, actor: str = CANARIES) -> None:
        """Take an endpoint out of traffic, here at once and in all processes within a second."""
        name, model = endpoint.provider.name, endpoint.model.id
        sentence = f"{name} {fault}"
        endpoint.quarantine(sentence)
        log.error("%s is quarantined for %s: %s", name, model, sentence)
        passed_at = int(endpoint.passed_at * 1000) or None
        await self._report(
            Verdict(
                provider=name, model=model, verdict="quarantined", finding=sentence, passed_at=passed_at, actor=actor
            )
        )

    async def _report(self, verdict: Verdict) -> None:
        """Tell the other processes of a verdict."""
        key = verdict.provider, verdict.model
        number = self._verdicts[key].number if key in self._verdicts else 0
        self._verdicts[key] = verdict = replace(verdict, number=number)  # until it is stored, what is older ranks below
        try:
            number = await asyncio.to_thread(self.report, verdict)
            if self._verdicts[key] is verdict:
                self._verdicts[key] = replace(verdict, number=max(number, verdict.number))
        except UnmaskError as error:
            log.error("other processes do not know that %s is %s: %s", verdict.provider, verdict.verdict, error)
