"""`unmask evaluate`: every model on every task, and what is written about it.

What is finished stays finished: vectors are kept as they are computed, a task's score when it is known, so a run that
was killed continues, and one that is repeated with another model pays for that model alone.
"""

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np

from unmask import __version__
from unmask.disk import atomic_write
from unmask.errors import MissingPackages, StorageError, UsageError
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.cost import LoadedModel, load_model, measure_cost, sample_texts
from unmask.evaluate.models import open_model
from unmask.evaluate.models.embedding_model import EmbeddingModel, uncut
from unmask.evaluate.progress import RunProgress
from unmask.evaluate.published_scores import published_score
from unmask.evaluate.results import ModelResult, Provenance, Results, TaskScore, write_example_values, write_results
from unmask.evaluate.statistics import bootstrap_interval
from unmask.evaluate.suites import Job, plan_jobs
from unmask.home import home

_PACKAGES = ("mteb", "torch", "numpy", "scikit-learn", "scipy", "datasets", "sentence-transformers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be measured.

    Attributes:
        models: specifications, see `unmask.evaluate.models`; the report is about the first.
        baselines: others to hold them against.
        suites, tasks: see `unmask.evaluate.suites`.
        data: folder that local and word-level tasks are read from.
        output: gets what `unmask.evaluate.results` says.
        published: folder of published scores; left out, `mteb_results` in `data` where there is one.
        defaults: options for every model whose kind knows them (dtype, device).
        command: what the user typed, for the report.
    """

    models: Sequence[str]
    baselines: Sequence[str] = ()
    suites: Sequence[str] = ()
    tasks: Sequence[str] = ()
    data: Path | None = None
    output: Path
    published: Path | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


class _Kept(msgspec.Struct):
    """A finished task on disk, and what it hangs on besides the model's and the data's digests."""

    revision: str
    settings: str
    score: TaskScore


def evaluate(wanted: Evaluation) -> Results:
    """Measure, and write results, examples and report.

    A task that fails is recorded with its error and the others go on: see `TaskScore.error`.

    Raises:
        UsageError: a specification, suite or task is wrong, or a package is missing. Nothing was measured then.
        CheckpointError: a model cannot be loaded. Nothing was measured then.
        StorageError: the output cannot be written.
    """
    began, started = time.perf_counter(), datetime.now(UTC)
    _require_packages()
    published = _published_folder(wanted)
    jobs = plan_jobs(wanted.suites, wanted.tasks, wanted.data)
    if not jobs:
        raise UsageError("nothing to measure: name a --suite or a --task")
    import sentence_transformers  # noqa: F401 - here, so that no model is charged with the memory of its libraries

    texts = sample_texts()
    specifications = list(dict.fromkeys([*wanted.models, *wanted.baselines]))
    with RunProgress(len(specifications) * len(jobs)) as progress:
        loaded: list[LoadedModel] = []
        for specification in specifications:
            progress.say(f"loading {specification}")
            loaded.append(load_model(partial(open_model, specification, wanted.defaults), texts))
        models = _model_results(loaded)
        for item, model in zip(loaded, models, strict=True):
            measured = [
                _run_or_recall(item.contender, model, job, wanted, published, progress)
                for job in jobs
                if job.category != "WordLevel" or item.contender.kind == "unmask"
            ]
            model.scores.extend(measured)
        progress.say("measuring speed, in turns")
        for model, cost in zip(models, measure_cost(loaded, texts), strict=True):
            model.cost = cost
    results = Results(
        suites=list(wanted.suites),
        models=models,
        provenance=Provenance(
            command=wanted.command,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - began,
            machine=machine(),
            versions=_versions(),
            data={job.name: job.data for job in jobs if job.data is not None},
        ),
    )
    write_results(wanted.output, results)
    from unmask.evaluate.report import write_report

    write_report(wanted.output, results, published=published)
    return results


def _run_or_recall(
    contender: EmbeddingModel,
    model: ModelResult,
    job: Job,
    wanted: Evaluation,
    published: Path | None,
    progress: RunProgress,
) -> TaskScore:
    file = wanted.output / "scores" / model.slug / f"{job.name}.json"
    settings = _settings(contender)
    score = _recall(file, contender, settings, job)
    kept = score is not None
    if score is None:
        progress.begin(model.name, job.name, "sentences" if job.build is None else "texts")
        score, values = _measure(contender, job, wanted, progress)
        if score.error is None:
            if values is not None:
                write_example_values(wanted.output, model, job.name, values)
                score.interval = bootstrap_interval(values, score.statistic, seed=0)
            with atomic_write(file) as partial_file:
                partial_file.write_bytes(msgspec.json.encode(_Kept(contender.revision, settings, score)))
    # Looked up every time: the folder of published scores is not part of what was measured.
    found = published and published_score(published, model.name, job.name, data_from_mteb=job.data is None)
    score.published, score.published_source = found or (None, None)
    progress.done(model.name, score, kept)
    return score


def _recall(file: Path, contender: EmbeddingModel, settings: str, job: Job) -> TaskScore | None:
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    same = (kept.revision, kept.settings, kept.score.data) == (contender.revision, settings, job.data)
    return kept.score if same else None


def _measure(
    contender: EmbeddingModel, job: Job, wanted: Evaluation, progress: RunProgress
) -> tuple[TaskScore, np.ndarray | None]:
    began = time.perf_counter()
    try:
        if job.build is None:
            return _measure_words(contender, job, wanted, progress)
        from unmask.evaluate.harness import MtebModel, measure

        whole = uncut(contender)
        cache = VectorCache(home() / "vectors", whole.revision, whole.dimensions)
        score, values = measure(MtebModel(contender, cache, progress), job.build(), wanted.output / "mteb")
        score.data = job.data
        return score, values
    except StorageError:
        raise  # a full disk fails every task after this one as well
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not lose the other tasks
        told = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
        return TaskScore(
            task=job.name,
            category=job.category,
            metric="",
            error=why,
            data=job.data,
            seconds=time.perf_counter() - began,
        ), None


def _measure_words(
    contender: EmbeddingModel, job: Job, wanted: Evaluation, progress: RunProgress
) -> tuple[TaskScore, np.ndarray]:
    from unmask.evaluate.models.decoder import DecoderModel
    from unmask.evaluate.word_level import run_word_task

    decoder = uncut(contender)
    assert isinstance(decoder, DecoderModel) and wanted.data is not None
    found = run_word_task(
        job.name,
        decoder.encoder,
        wanted.data,
        home() / "words",
        revision=decoder.revision,
        progress=progress.settled,
    )
    score = TaskScore(
        task=job.name,
        category="WordLevel",
        metric="accuracy",
        score=found.accuracy,
        examples=len(found.values),
        seconds=found.seconds,
        data=found.data,
        details={
            **found.details,
            "states": found.states,
            "train_words": found.train_words,
            "test_words": found.test_words,
        },
    )
    return score, found.values


def _model_results(loaded: Sequence[LoadedModel]) -> list[ModelResult]:
    from unmask.evaluate.results import Cost

    models = []
    for contender, _ in loaded:
        details: dict[str, str | float | int] = {}
        if getattr(contender, "causal", False):
            details["attention"] = "causal"
        models.append(
            ModelResult(
                name=contender.name,
                kind=contender.kind,
                revision=contender.revision,
                cost=Cost(dimensions=contender.dimensions),
                details=details,
            )
        )
    slugs = [model.slug for model in models]
    twice = next((model.name for model in models if slugs.count(model.slug) > 1), None)
    if twice is not None:
        raise UsageError(f"two models would be called {twice}; tell them apart with ?name=")
    return models


def _published_folder(wanted: Evaluation) -> Path | None:
    if wanted.published is not None:
        if not wanted.published.is_dir():
            raise UsageError(f"--published {wanted.published} is not a folder")
        return wanted.published
    beside = wanted.data / "mteb_results" if wanted.data else None
    return beside if beside is not None and beside.is_dir() else None


def _settings(contender: EmbeddingModel) -> str:
    """8 hex digits of what else decides a score: the table of instructions, for models that read them."""
    if not contender.takes_instructions:
        return ""
    table = (files("unmask.evaluate") / "instructions.toml").read_bytes()
    return hashlib.sha256(table).hexdigest()[:8]


def _require_packages() -> None:
    for package in ("mteb", "sentence_transformers", "jinja2"):
        try:
            metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError as error:
            raise MissingPackages("measuring needs", "evaluate") from error


def machine() -> str:
    """This machine's processor, its cores and its system, as provenance has them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {platform.system()}"


def _versions() -> dict[str, str]:
    found = {"unmask": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
