"""mteb's harness over a contender: one task, its score in mteb's own format, and a value per example.

This module imports mteb, which takes seconds; nothing imports it before there is something to measure.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
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
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from mteb.types import PromptType
from threadpoolctl import threadpool_limits

from unmask.disk import atomic_write
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.instructions import REFERENCE_FAMILY, Side, instruction_for
from unmask.evaluate.models.embedding_model import EmbeddingModel, uncut
from unmask.evaluate.results import Category, Statistic, TaskScore

# Vectors that a kill loses at most, and the step in which progress is told.
_CHUNK = 256

# What stands beside the main score, by kind of task.
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
    """Who wants to know how far a task has come."""

    def expect(self, texts: int) -> None:
        """So many more texts need vectors."""
        ...

    def settled(self, texts: int) -> None:
        """So many of them have one, computed or from the cache."""
        ...

    def computed(self, texts: int, tokens: int | None, seconds: float) -> None:
        """So many were computed just now."""
        ...


class TaskMeasurement(NamedTuple):
    """A score, and the values per example that it follows from where there are any: [n] or [n, 2], see `Statistic`."""

    score: TaskScore
    values: np.ndarray | None


class MtebModel(AbsEncoder):
    """A contender as mteb's `EncoderProtocol`: the instruction of the task, vectors through the cache."""

    def __init__(self, contender: EmbeddingModel, cache: VectorCache, watch: TaskProgress) -> None:
        self._contender, self._cache, self._watch = contender, cache, watch
        self.mteb_model_meta = model_meta(contender)
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
        """Vectors of a task's texts, float32 [n, dimensions]. The cache holds them uncut."""
        # A text of blanks has no vector here, and some tasks have one or two: mteb's own models give them one.
        texts = [text if text.strip() else "." for batch in inputs for text in batch["text"]]
        instruction = self.instruction(task_metadata, prompt_type)
        self._watch.expect(len(texts))
        whole = self._cache.encode(
            texts,
            instruction,
            lambda part: self._compute(part, instruction),
            chunk=_CHUNK,
            progress=self._watch.settled,
        )
        return whole[:, : self._contender.dimensions]

    def instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """What the model is told about one side of a task."""
        if not self._contender.takes_instructions:
            return ""
        side: Side = "documents" if prompt_type is PromptType.document else "queries"
        prompt = self.get_instruction(task_metadata, PromptType.query)
        return instruction_for(task_metadata.name, task_metadata.type, side, prompt, model=self._contender.name)

    def _compute(self, texts: list[str], instruction: str) -> np.ndarray:
        began = time.perf_counter()
        with threadpool_limits(self._threads):  # `measure` holds them at one
            vectors = uncut(self._contender).encode(texts, instruction)
        seconds = time.perf_counter() - began
        self._watch.computed(len(texts), self._contender.count_tokens(texts, instruction), seconds)
        return vectors


def model_meta(contender: EmbeddingModel) -> ModelMeta:
    """What mteb wants to know of a model. The published LLM2Vec models have their entry in mteb, with the training data
    that decides what counts as zero-shot; others get what is known and None for the rest.
    """
    if contender.name.startswith(REFERENCE_FAMILY) and contender.name in {meta.name for meta in mteb.get_model_metas()}:
        return mteb.get_model_meta(contender.name)
    name = contender.name.replace(" ", "_")
    return ModelMeta(
        loader=None,
        name=name if name.count("/") == 1 else f"unpublished/{name.replace('/', '_')}",
        revision=contender.revision,
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=contender.parameters,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=contender.dimensions,
        license=None,
        open_weights=None if contender.kind == "endpoint" else True,
        public_training_code=None,
        public_training_data=None,
        framework=["API"] if contender.kind == "endpoint" else ["PyTorch"],
        similarity_fn_name="cosine",  # type: ignore[arg-type]
        use_instructions=contender.takes_instructions,
        training_datasets=None,
    )


def measure(model: MtebModel, task: AbsTask, folder: Path) -> TaskMeasurement:
    """Run one task through mteb.

    Args:
        model: what is measured.
        task: a fresh one. Its data may be loaded already; otherwise mteb fetches them.
        folder: gets `<model>/<revision>/<task>.json` and `model_meta.json`, ready to be submitted to mteb.

    Raises:
        Exception: whatever the task, its data or the model raise.
    """
    began = time.perf_counter()
    category: Category = task.metadata.type  # type: ignore[assignment]
    single = not isinstance(task, AbsTaskAggregate) and len(task.eval_splits) == 1 and len(task.hf_subsets) == 1
    if single:
        task.load_data()  # kept after the run, for the gold labels; what mteb loads itself it drops
    # The probes and clusterings of mteb are far too small to share: two threads took ten times as long as one.
    alone = threadpool_limits(1)
    with tempfile.TemporaryDirectory() as scratch, _quiet(), _per_query(task) as per_query, alone:
        result = mteb.evaluate(
            cast(Any, model),  # mteb's protocol has a constructor, which is its own command line's
            task,
            co2_tracker=False,
            cache=None,
            # mteb writes a thousand documents per query of a retrieval task; what is needed of them is caught above.
            prediction_folder=None if isinstance(task, AbsTaskRetrieval) else Path(scratch),
            show_progress_bar=False,
            encode_kwargs={"batch_size": _CHUNK, "show_progress_bar": False},
        ).task_results[0]
        values, statistic = _examples(task, result, Path(scratch), per_query) if single else (None, "mean")
    _write(result, model.mteb_model_meta, folder)
    first = next(iter(result.scores.values()))[0]
    score = TaskScore(
        task=task.metadata.name,
        category=category,
        metric=task.metadata.main_score,
        score=100 * float(result.get_score()),
        examples=0 if values is None else len(values),
        statistic=statistic,
        instruction=model.instruction(task.metadata, PromptType.query if category == "Retrieval" else None),
        seconds=time.perf_counter() - began,
        details={key: round(100 * float(first[key]), 4) for key in _DETAILS.get(category, ()) if key in first},
    )
    return TaskMeasurement(score, values)


def _examples(
    task: AbsTask, result: TaskResult, scratch: Path, per_query: dict[str, dict[str, float]]
) -> tuple[np.ndarray | None, Statistic]:
    """The values per example of a task with one split and one subset."""
    split, subset = task.eval_splits[0], task.hf_subsets[0]
    (scores,) = result.scores[split]
    if isinstance(task, AbsTaskRetrieval):
        key = _trec_name(task.metadata.main_score)
        found = [query[key] for query in per_query.values() if key in query]
        return (np.array(found, dtype=np.float32) if found else None), "mean"
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
        told = np.array(_predictions(task, scratch, subset, split))  # [experiments, examples]
        right = told == np.array(_data(task, subset)[split][task.label_column_name])
        return right.mean(axis=0, dtype=np.float64).astype(np.float32), "mean"
    return None, "mean"


def _data(task: AbsTask, subset: str) -> Any:
    data: Any = task.dataset
    return data.get(subset, data)


def _predictions(task: AbsTask, scratch: Path, subset: str, split: str) -> Any:
    return json.loads((scratch / task.prediction_file_name).read_text(encoding="utf-8"))[subset][split]


def _trec_name(metric: str) -> str:
    """mteb's name of a retrieval metric -> trec_eval's, under which it keeps the values per query.

    >>> _trec_name("ndcg_at_10"), _trec_name("recall_at_5")
    ('ndcg_cut_10', 'recall_5')
    """
    name, _, k = metric.rpartition("_at_")
    return f"{name}_cut_{k}" if name in ("ndcg", "map") else f"{name}_{k}"


@contextmanager
def _per_query(task: AbsTask) -> Iterator[dict[str, dict[str, float]]]:
    """Catches the scores of each query, which a retrieval task shows to its own hook for further scores."""
    caught: dict[str, dict[str, float]] = {}
    if not isinstance(task, AbsTaskRetrieval):
        yield caught
        return
    original = task.task_specific_scores

    def hook(scores: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        caught.update(scores)
        return original(scores, *args, **kwargs)

    task.task_specific_scores = hook  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        del task.task_specific_scores


def _write(result: TaskResult, meta: ModelMeta | None, folder: Path) -> None:
    assert meta is not None
    place = folder / meta.model_name_as_path() / (meta.revision or "no_revision_available")
    with atomic_write(place / f"{result.task_name}.json") as partial:
        result.to_disk(partial)
    with atomic_write(place / "model_meta.json") as partial:
        partial.write_text(json.dumps(meta.to_dict(), default=str, indent=4), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """mteb and datasets narrate and draw bars of their own; ours stands where they would."""
    import datasets

    logger = logging.getLogger("mteb")
    level, drawing = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if drawing:
            datasets.enable_progress_bars()
