"""mteb's harness around an embedding model: one task, its score in mteb's own format, and a value per example.

This module imports mteb, which takes seconds; import it only when there is something to measure.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import mteb
import numpy as np
import torch
from mteb import AbsTask
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import FRAMEWORKS, ModelMeta
from mteb.results import TaskResult
from mteb.types import PromptType
from threadpoolctl import threadpool_limits

from unmask.disk import atomic_write
from unmask.evaluate.cache import CachedModel
from unmask.evaluate.instructions import REFERENCE_FAMILY, Side, instruction_for
from unmask.evaluate.models import EmbeddingModel
from unmask.evaluate.results import Category, Statistic, TaskScore

# Vectors that a kill loses at most, and the step of the progress shown.
_CHUNK = 256
# By kind of model, in mteb's words. All others are PyTorch.
_FRAMEWORKS: dict[str, FRAMEWORKS] = {"endpoint": "API", "onnxruntime": "ONNX"}

# Metrics beside the main score, by kind of task.
_DETAILS: dict[str, tuple[str, ...]] = {
    "STS": ("cosine_pearson", "manhattan_spearman", "euclidean_spearman"),
    "Classification": ("f1", "f1_weighted"),
    "Clustering": ("v_measure_std", "ami"),
    "Retrieval": ("recall_at_10", "recall_at_100", "mrr_at_10", "map_at_100"),
    "Reranking": ("mrr_at_10", "ndcg_at_10"),
    "PairClassification": ("cosine_ap", "cosine_f1", "cosine_accuracy"),
    "Summarization": ("cosine_pearson",),
}


class TaskProgress(Protocol):
    """A listener to the progress of one task."""

    def expect(self, texts: int) -> None:
        """Add texts that need vectors to the total."""
        ...

    def finish_texts(self, texts: int) -> None:
        """Advance by texts that have a vector now, computed or from the cache."""
        ...

    def add_speed(self, texts: int, tokens: int | None, seconds: float) -> None:
        """Count texts that the model has just encoded."""
        ...


class TaskMeasurement(NamedTuple):
    """A score and the per-example values behind it, [n] or [n, 2] (see `Statistic`); None where there are none."""

    score: TaskScore
    values: np.ndarray | None


class MtebModel(AbsEncoder):
    """An embedding model as mteb's `EncoderProtocol`: adds the task's instruction and caches the vectors.

    Args:
        model: the model under test.
        cache: folder of a `VectorCache`.
        progress: listener.
    """

    def __init__(self, model: EmbeddingModel, cache: Path, progress: TaskProgress) -> None:
        self._model, self._progress = model, progress
        self._cached_model = CachedModel(model, cache, on_computed=self._report_speed)
        self.mteb_model_meta = model_meta(model)
        self._threads = torch.get_num_threads()

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return the vectors of a task's texts, float32 [n, dimensions]."""
        # A blank text has no vector here, and some tasks have one or two: mteb's own models give them one.
        texts = [text if text.strip() else "." for batch in inputs for text in batch["text"]]
        instruction = self.instruction(task_metadata, prompt_type)
        self._progress.expect(len(texts))
        # `measure` holds mteb itself to one thread; the model gets all of them back.
        with threadpool_limits(self._threads):
            return self._cached_model.encode(texts, instruction, chunk=_CHUNK, progress=self._progress.finish_texts)

    def instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """Return the instruction for one side of a task; "" for models that take none."""
        if not self._model.takes_instructions:
            return ""
        side: Side = "documents" if prompt_type is PromptType.document else "queries"
        prompt = self.get_instruction(task_metadata, PromptType.query)
        return instruction_for(task_metadata.name, task_metadata.type, side, prompt, model=self._model.name)

    def _report_speed(self, texts: Sequence[str], instruction: str, seconds: float) -> None:
        self._progress.add_speed(len(texts), self._model.count_tokens(texts, instruction), seconds)


def model_meta(model: EmbeddingModel) -> ModelMeta:
    """Return mteb's description of a model.

    The published LLM2Vec models have theirs in mteb, with the training data that decides which tasks are zero-shot.
    Other models get the fields that are known, and None for the rest.
    """
    if model.name.startswith(REFERENCE_FAMILY) and model.name in {meta.name for meta in mteb.get_model_metas()}:
        return mteb.get_model_meta(model.name)
    name = model.name.replace(" ", "_")
    return ModelMeta(
        loader=None,
        name=name if name.count("/") == 1 else f"unpublished/{name.replace('/', '_')}",
        revision=model.revision,
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=model.parameters,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=model.dimensions,
        license=None,
        open_weights=None if model.kind == "endpoint" else True,
        public_training_code=None,
        public_training_data=None,
        framework=[_FRAMEWORKS.get(model.kind, "PyTorch")],
        similarity_fn_name="cosine",  # type: ignore[arg-type]
        use_instructions=model.takes_instructions,
        training_datasets=None,
    )


def measure(model: MtebModel, task: AbsTask, folder: Path) -> TaskMeasurement:
    """Run one task through mteb.

    Args:
        model: the model under test.
        task: a fresh one. Its data may be loaded already; otherwise mteb fetches them.
        folder: receives `<model>/<revision>/<task>.json` and `model_meta.json`, ready to be submitted to mteb.

    Raises:
        Exception: any error of the task, its data or the model.
    """
    start = time.perf_counter()
    category: Category = task.metadata.type  # type: ignore[assignment]
    is_single = not isinstance(task, AbsTaskAggregate) and len(task.eval_splits) == 1 and len(task.hf_subsets) == 1
    if is_single:
        # mteb drops data that it loads itself. Loaded here, they stay for the gold labels.
        task.load_data()
    with (
        tempfile.TemporaryDirectory() as scratch,
        _quiet(),
        _query_scores(task) as query_scores,
        _labels_read_once(task),
        # The probes and clusterings of mteb are far too small to share: two threads took ten times as long as one.
        threadpool_limits(1),
    ):
        result = mteb.evaluate(
            cast(Any, model),  # mteb's protocol has a constructor, for the command line of mteb
            task,
            co2_tracker=False,
            cache=None,
            # For a retrieval task mteb writes a thousand documents per query; `_query_scores` has all that is needed.
            prediction_folder=None if isinstance(task, AbsTaskRetrieval) else Path(scratch),
            show_progress_bar=False,
            encode_kwargs={"batch_size": _CHUNK, "show_progress_bar": False},
        ).task_results[0]
        values, statistic = _example_values(task, result, Path(scratch), query_scores) if is_single else (None, "mean")
    _write_mteb_result(result, model.mteb_model_meta, folder)
    first = next(iter(result.scores.values()))[0]
    score = TaskScore(
        task=task.metadata.name,
        category=category,
        metric=task.metadata.main_score,
        score=100 * float(result.get_score()),
        examples=0 if values is None else len(values),
        statistic=statistic,
        instruction=model.instruction(task.metadata, PromptType.query if category == "Retrieval" else None),
        seconds=time.perf_counter() - start,
        details={key: round(100 * float(first[key]), 4) for key in _DETAILS.get(category, ()) if key in first},
    )
    return TaskMeasurement(score, values)


def _example_values(
    task: AbsTask, result: TaskResult, scratch: Path, query_scores: dict[str, dict[str, float]]
) -> tuple[np.ndarray | None, Statistic]:
    """Return the per-example values of a task with one split and one subset, and the statistic that sums them up."""
    split, subset = task.eval_splits[0], task.hf_subsets[0]
    (scores,) = result.scores[split]
    if isinstance(task, AbsTaskRetrieval):
        metric = _trec_name(task.metadata.main_score)
        values = [query[metric] for query in query_scores.values() if metric in query]
        return (np.array(values, dtype=np.float32) if values else None), "mean"
    if isinstance(task, AbsTaskClustering):
        return np.array([v for level in scores["v_measures"].values() for v in level], dtype=np.float32), "mean"
    if isinstance(task, AbsTaskClusteringLegacy):
        return np.array(scores["v_measures"], dtype=np.float32), "mean"
    if isinstance(task, AbsTaskSTS) and task.metadata.main_score == "cosine_spearman":
        predicted = _predictions(task, scratch, subset, split)["cosine_scores"]
        return np.column_stack([predicted, _data(task, subset)[split]["score"]]).astype(np.float64), "spearman"
    if (
        isinstance(task, AbsTaskClassification)
        and not task.is_cross_validation
        and scores["main_score"] == scores["accuracy"]
    ):
        predicted = np.array(_predictions(task, scratch, subset, split))  # [experiments, examples]
        correct = predicted == np.array(_data(task, subset)[split][task.label_column_name])
        return correct.mean(axis=0, dtype=np.float64).astype(np.float32), "mean"
    return None, "mean"


def _data(task: AbsTask, subset: str) -> Any:
    data: Any = task.dataset
    return data.get(subset, data)


def _predictions(task: AbsTask, scratch: Path, subset: str, split: str) -> Any:
    return json.loads((scratch / task.prediction_file_name).read_text(encoding="utf-8"))[subset][split]


def _trec_name(metric: str) -> str:
    """Translate mteb's name of a retrieval metric to trec_eval's, under which mteb keeps the values per query.

    >>> _trec_name("ndcg_at_10"), _trec_name("recall_at_5")
    ('ndcg_cut_10', 'recall_5')
    """
    name, _, k = metric.rpartition("_at_")
    return f"{name}_cut_{k}" if name in ("ndcg", "map") else f"{name}_{k}"


@contextmanager
def _query_scores(task: AbsTask) -> Iterator[dict[str, dict[str, float]]]:
    """Collect the scores of each query of a retrieval task while the block runs; stays empty for other tasks.

    mteb averages these scores and drops them. `task_specific_scores` is its hook for further metrics, and the only
    place that receives them, so the hook of this one task object is replaced during the block.
    """
    collected: dict[str, dict[str, float]] = {}
    if not isinstance(task, AbsTaskRetrieval):
        yield collected
        return
    original_hook = task.task_specific_scores

    def hook(scores: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        collected.update(scores)
        return original_hook(scores, *args, **kwargs)

    task.task_specific_scores = hook  # type: ignore[method-assign]
    try:
        yield collected
    finally:
        del task.task_specific_scores


@contextmanager
def _labels_read_once(task: AbsTask) -> Iterator[None]:
    """Give the metrics of a classification their gold labels as an array while the block runs.

    mteb hands them a column of the data set. Each of nine metrics reads it several times, row by row, and does so in
    every experiment: more work than training the classifiers.
    """
    if not isinstance(task, AbsTaskClassification):
        yield
        return
    original_metrics = task._calculate_scores
    task._calculate_scores = lambda labels, predictions: original_metrics(np.asarray(labels[:]), predictions)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del task._calculate_scores  # type: ignore[attr-defined]


def _write_mteb_result(result: TaskResult, meta: ModelMeta | None, folder: Path) -> None:
    assert meta is not None
    model_folder = folder / meta.model_name_as_path() / (meta.revision or "no_revision_available")
    with atomic_write(model_folder / f"{result.task_name}.json") as partial:
        result.to_disk(partial)
    with atomic_write(model_folder / "model_meta.json") as partial:
        partial.write_text(json.dumps(meta.to_dict(), default=str, indent=4), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and progress bars of mteb and datasets, which would break ours."""
    import datasets

    logger = logging.getLogger("mteb")
    level, had_bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
