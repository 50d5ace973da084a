"""Suites of tasks by name, single tasks by name, and the jobs to run for them.

local         offline, over a folder of data: LOCAL_TASKS and the word-level tasks
llm2vec-15    the 15 tasks of MTEB on which LLM2Vec compares its recipes (arXiv 2404.05961, appendix)
mteb-eng-v1   the 56 tasks of MTEB, English, version 1
mteb-eng-v2   the 41 tasks of version 2
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from unmask.errors import MissingPackages, UsageError
from unmask.evaluate.local import FETCH_ADVICE, LOCAL_TASKS
from unmask.evaluate.results import Category

if TYPE_CHECKING:
    from mteb import AbsTask

LOCAL = "local"
_BENCHMARKS = {"mteb-eng-v1": "MTEB(eng, v1)", "mteb-eng-v2": "MTEB(eng, v2)"}
_LLM2VEC_15 = (
    "SciFact",
    "ArguAna",
    "NFCorpus",
    "StackOverflowDupQuestions",
    "SciDocsRR",
    "BiorxivClusteringS2S",
    "MedrxivClusteringS2S",
    "TwentyNewsgroupsClustering",
    "SprintDuplicateQuestions",
    "Banking77Classification",
    "EmotionClassification",
    "MassiveIntentClassification",
    "STS17",
    "SICK-R",
    "STSBenchmark",
)
SUITES = (LOCAL, "llm2vec-15", *_BENCHMARKS)


@dataclass(frozen=True)
class Job:
    """One task, ready to run for any number of models.

    Attributes:
        name: name of the task.
        category: kind of task.
        data: digest of its examples; None if mteb fetches them.
        build: makes a new task object of mteb's; None for word-level tasks, which are not mteb's.
    """

    name: str
    category: Category
    data: str | None
    build: "Callable[[], AbsTask] | None" = field(repr=False)


def plan_jobs(suites: Sequence[str], tasks: Sequence[str], data: Path | None) -> list[Job]:
    """Return the jobs of some suites and single tasks, each once, in the order of the arguments.

    A task whose data lie in the folder `data` is read from there; mteb fetches the others.

    Raises:
        UsageError: a suite or task does not exist, is of an unsupported type, or lacks its data.
    """
    jobs: dict[str, Job] = {}
    for suite in suites:
        if suite not in SUITES:
            raise UsageError(f"no suite is called {suite!r}; there are {', '.join(SUITES)}")
        for job in _suite_jobs(suite, data):
            jobs.setdefault(job.name, job)
    for name in tasks:
        jobs.setdefault(name, _task_job(name, data))
    return list(jobs.values())


def _suite_jobs(suite: str, data: Path | None) -> list[Job]:
    if suite == LOCAL:
        from unmask.evaluate.word_level import WORD_TASKS

        if data is None:
            raise UsageError(f"the suite local reads its tasks from a folder: --data FOLDER; {FETCH_ADVICE}")
        return [_local_job(name, data) for name in LOCAL_TASKS] + [_word_job(name, data) for name in WORD_TASKS]
    mteb = _mteb()
    if suite in _BENCHMARKS:
        return [_mteb_job(task.metadata.name, task) for task in mteb.get_benchmark(_BENCHMARKS[suite]).tasks]
    tasks = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    return [_mteb_job(name, tasks[name]) for name in _LLM2VEC_15]


def _task_job(name: str, data: Path | None) -> Job:
    from unmask.evaluate.word_level import WORD_TASKS

    if name in WORD_TASKS:
        if data is None:
            raise UsageError(f"{name} is read from a folder: --data FOLDER; {FETCH_ADVICE}")
        return _word_job(name, data)
    if name in LOCAL_TASKS and (data is not None or not LOCAL_TASKS[name].mteb_own):
        if data is None:
            raise UsageError(f"{name} is read from a folder: --data FOLDER; {FETCH_ADVICE}")
        return _local_job(name, data)
    mteb = _mteb()
    try:
        task = mteb.get_task(name, languages=["eng"], exclusive_language_filter=True)
    except KeyError as error:
        raise UsageError(f"no task is called {name!r}: {str(error.args[0]).splitlines()[0]}") from error
    return _mteb_job(name, task)


def _local_job(name: str, data: Path) -> Job:
    task = LOCAL_TASKS[name]
    tables = task.read(data)
    return Job(name, task.category, task.digest(tables), partial(task.build, tables))


def _word_job(name: str, data: Path) -> Job:
    from unmask.evaluate.word_tasks import find_word_task, read_word_data

    return Job(name, "WordLevel", read_word_data(find_word_task(name), data).digest, None)


def _mteb_job(name: str, task: "AbsTask") -> Job:
    category = task.metadata.type
    if category not in get_args(Category):
        raise UsageError(f"{name} is a task of type {category}; measured are {', '.join(get_args(Category))}")
    subsets, splits = list(task.hf_subsets), list(task.eval_splits)
    return Job(name, category, None, partial(_new_task, name, subsets, splits))  # type: ignore[arg-type]


def _new_task(name: str, subsets: list[str], splits: list[str]) -> "AbsTask":
    return _mteb().get_task(name, hf_subsets=subsets, eval_splits=splits)


def _mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise MissingPackages("measuring needs", "evaluate") from error
    return mteb
