"""`unmask evaluate`: measure every model on every task, and write results and report.

Vectors are stored as they are computed, and a task's score as soon as it is known. A run that was killed continues,
and a run that is repeated with another model pays for that model alone.
"""

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np

from unmask import __version__
from unmask.disk import atomic_write
from unmask.errors import MissingPackages, StorageError, UsageError
from unmask.evaluate.cost import measure_cost, sample_texts
from unmask.evaluate.memory import MemoryUnknown, measure_memory
from unmask.evaluate.models import EmbeddingModel, TruncatedModel, open_model
from unmask.evaluate.models.decoder import DecoderModel, decoder_model
from unmask.evaluate.progress import RunProgress
from unmask.evaluate.published_scores import published_score
from unmask.evaluate.results import (
    Cost,
    ModelResult,
    Provenance,
    Results,
    TaskScore,
    slug_of,
    write_example_values,
    write_results,
)
from unmask.evaluate.statistics import bootstrap_interval
from unmask.evaluate.suites import Job, plan_jobs
from unmask.home import home

_PACKAGES = ("mteb", "torch", "numpy", "scikit-learn", "scipy", "datasets", "sentence-transformers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models, tasks and folders of one evaluation.

    Attributes:
        models: specifications, see `unmask.evaluate.models.specification`; the report is about the first.
        baselines: specifications of further models to compare with.
        suites, tasks: names, see `unmask.evaluate.suites`.
        data: folder of the local and word-level tasks.
        output: receives the files that `unmask.evaluate.results` lists.
        published: folder of published scores; by default `mteb_results` in `data`, if it exists.
        defaults: option -> value for every model whose kind has the option (dtype, device). Without a dtype, a single
            model is measured in auto, and several in float32, so that their scores differ by nothing else.
        command: command line as the user typed it, for the report.
        peaks: specification -> bytes of memory that the caller has measured, see `unmask.evaluate.memory`.
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
    peaks: Mapping[str, int | None] = field(default_factory=dict)


class _StoredScore(msgspec.Struct):
    """A finished task on disk, and the digests that must match for it to be used again."""

    revision: str
    settings: str
    score: TaskScore


def run_evaluation(evaluation: Evaluation) -> Results:
    """Measure all models, and write results, per-example values and report.

    A task that fails is recorded with its error (`TaskScore.error`), and the others go on.

    Raises:
        UsageError: a specification, suite or task is wrong, or a package is missing. Nothing was measured then.
        CheckpointError: a model cannot be loaded. Nothing was measured then.
        StorageError: the output cannot be written.
    """
    start, started = time.perf_counter(), datetime.now(UTC)
    _require_packages()
    published = _published_folder(evaluation)
    jobs = plan_jobs(evaluation.suites, evaluation.tasks, evaluation.data)
    if not jobs:
        raise UsageError("nothing to measure: name a --suite or a --task")
    specifications = list(dict.fromkeys([*evaluation.models, *evaluation.baselines]))
    with RunProgress(len(specifications) * len(jobs)) as progress:
        texts = sample_texts()
        defaults = {"dtype": "auto" if len(specifications) == 1 else "float32", **evaluation.defaults}
        models = _load_models(specifications, defaults, texts, progress)
        peaks = _measure_peaks(evaluation.peaks, specifications, models, defaults, texts, progress)
        scores = []
        for model in models:
            run = _ModelRun(model, evaluation, published, progress)
            scores.append([run.score(job) for job in jobs if run.can_run(job)])
        progress.log("measuring speed, in turns")
        costs = measure_cost(models, peaks, texts)
    results = Results(
        suites=list(evaluation.suites),
        models=[
            _model_result(model, model_scores, cost)
            for model, model_scores, cost in zip(models, scores, costs, strict=True)
        ],
        provenance=Provenance(
            command=evaluation.command,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - start,
            machine=machine(),
            versions=_versions(),
            data={job.name: job.data for job in jobs if job.data is not None},
        ),
    )
    write_results(evaluation.output, results)
    from unmask.evaluate.report import write_report

    write_report(evaluation.output, results, published=published)
    return results


def _load_models(
    specifications: Sequence[str], defaults: Mapping[str, str], texts: Sequence[str], progress: RunProgress
) -> list[EmbeddingModel]:
    """Open all models and let each encode the sample once, which warms it up."""
    models: list[EmbeddingModel] = []
    for specification in specifications:
        progress.log(f"loading {specification}")
        models.append(open_model(specification, defaults))
        models[-1].encode(texts)
    slugs = [slug_of(model.name) for model in models]
    repeated = next((model.name for model in models if slugs.count(slug_of(model.name)) > 1), None)
    if repeated is not None:
        raise UsageError(f"two models would be called {repeated}; tell them apart with ?name=")
    return models


def _measure_peaks(
    known_peaks: Mapping[str, int | None],
    specifications: Sequence[str],
    models: Sequence[EmbeddingModel],
    defaults: Mapping[str, str],
    texts: Sequence[str],
    progress: RunProgress,
) -> list[int | None]:
    """Return the memory of each model, None where it is unknown. Truncations of a model need what the model needs.

    Those of `known_peaks` are not measured. The models were loaded here before, so that a measured load finds prepacked
    weights, as every later one does.
    """
    peaks: dict[str, int | None] = {}
    for specification, model in zip(specifications, models, strict=True):
        revision = _base_revision(model)
        if revision in peaks:
            continue
        if specification in known_peaks:
            peaks[revision] = known_peaks[specification]
            continue
        progress.log(f"measuring the memory of {model.name}")
        try:
            peaks[revision] = measure_memory(specification, defaults, texts)
        except MemoryUnknown as error:
            peaks[revision] = None
            progress.log(f"the memory of {model.name} stays unknown: {error}")
    return [peaks[_base_revision(model)] for model in models]


def _base_revision(model: EmbeddingModel) -> str:
    return (model.base if isinstance(model, TruncatedModel) else model).revision


def _model_result(model: EmbeddingModel, scores: list[TaskScore], cost: Cost) -> ModelResult:
    decoder = decoder_model(model)
    return ModelResult(
        name=model.name,
        kind=model.kind,
        revision=model.revision,
        cost=cost,
        scores=scores,
        details={} if decoder is None else _decoder_details(decoder),
    )


def _decoder_details(decoder: DecoderModel) -> dict[str, str | float | int]:
    choice = decoder.encoder.dtype_choice
    return {
        "precision": choice.dtype,
        "precision_reason": choice.reason,
        **({"attention": "causal"} if decoder.causal else {}),
    }


@dataclass(frozen=True)
class _ModelRun:
    """The tasks of one model.

    Attributes:
        published: folder of published scores, if there is one.
    """

    model: EmbeddingModel
    evaluation: Evaluation
    published: Path | None
    progress: RunProgress

    def can_run(self, job: Job) -> bool:
        """Return False for word-level tasks of models that are not decoders: only those give states of words."""
        return job.category != "WordLevel" or decoder_model(self.model) is not None

    def score(self, job: Job) -> TaskScore:
        """Measure a task, or read its score from an earlier run with the same model, data and settings."""
        score = self._stored_score(job)
        is_stored = score is not None
        if score is None:
            self.progress.begin(self.model.name, job.name, "sentences" if job.build is None else "texts")
            score = self._measure_and_store(job)
        # Looked up every time: the folder of published scores is no part of the measurement.
        published = self.published and published_score(
            self.published, self.model.name, job.name, data_from_mteb=job.data is None
        )
        published_figure, source = published or (None, None)
        score = msgspec.structs.replace(score, published=published_figure, published_source=source)
        self.progress.finish_task(self.model.name, score, from_earlier_run=is_stored)
        return score

    def _score_file(self, job: Job) -> Path:
        return self.evaluation.output / "scores" / slug_of(self.model.name) / f"{job.name}.json"

    def _stored_score(self, job: Job) -> TaskScore | None:
        try:
            stored = msgspec.json.decode(self._score_file(job).read_bytes(), type=_StoredScore)
        except (OSError, msgspec.MsgspecError):
            return None
        is_same = (stored.revision, stored.settings, stored.score.data) == (
            self.model.revision,
            _settings_digest(self.model),
            job.data,
        )
        return stored.score if is_same else None

    def _measure_and_store(self, job: Job) -> TaskScore:
        score, values = _measure(self.model, job, self.evaluation, self.progress)
        if score.error is not None:
            return score
        if values is not None:
            write_example_values(self.evaluation.output, self.model.name, job.name, values)
            score = msgspec.structs.replace(score, interval=bootstrap_interval(values, score.statistic, seed=0))
        with atomic_write(self._score_file(job)) as partial_file:
            stored = _StoredScore(self.model.revision, _settings_digest(self.model), score)
            partial_file.write_bytes(msgspec.json.encode(stored))
        return score


def _measure(
    model: EmbeddingModel, job: Job, evaluation: Evaluation, progress: RunProgress
) -> tuple[TaskScore, np.ndarray | None]:
    """Return the score of a task and its per-example values; if the task fails, a score that holds the error."""
    start = time.perf_counter()
    try:
        if job.build is None:
            return _measure_words(model, job, evaluation, progress)
        from unmask.evaluate.harness import MtebModel, measure

        mteb_model = MtebModel(model, home() / "vectors", progress)
        score, values = measure(mteb_model, job.build(), evaluation.output / "mteb")
        return msgspec.structs.replace(score, data=job.data), values
    except StorageError:
        raise  # a full disk fails every task after this one as well
    except Exception as error:  # noqa: BLE001 - no error of one task may lose the others
        lines = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return TaskScore(
            task=job.name,
            category=job.category,
            metric="",
            error=message,
            data=job.data,
            seconds=time.perf_counter() - start,
        ), None


def _measure_words(
    model: EmbeddingModel, job: Job, evaluation: Evaluation, progress: RunProgress
) -> tuple[TaskScore, np.ndarray]:
    from unmask.evaluate.word_level import run_word_task

    decoder = decoder_model(model)
    assert isinstance(decoder, DecoderModel) and evaluation.data is not None
    result = run_word_task(
        job.name,
        decoder.encoder,
        evaluation.data,
        home() / "words",
        revision=decoder.revision,
        progress=progress.finish_texts,
    )
    score = TaskScore(
        task=job.name,
        category="WordLevel",
        metric="accuracy",
        score=result.accuracy,
        examples=len(result.values),
        seconds=result.seconds,
        data=result.data,
        details={
            **result.details,
            "states": result.states,
            "train_words": result.train_words,
            "test_words": result.test_words,
        },
    )
    return score, result.values


def _published_folder(evaluation: Evaluation) -> Path | None:
    if evaluation.published is not None:
        if not evaluation.published.is_dir():
            raise UsageError(f"--published {evaluation.published} is not a folder")
        return evaluation.published
    default = evaluation.data / "mteb_results" if evaluation.data else None
    return default if default is not None and default.is_dir() else None


def _settings_digest(model: EmbeddingModel) -> str:
    """Return 8 hex digits over the table of instructions, which decides scores too; "" if the model takes none."""
    if not model.takes_instructions:
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
    """Return processor, number of cores and system of this machine, for provenance."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {platform.system()}"


def _versions() -> dict[str, str]:
    versions = {"unmask": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
