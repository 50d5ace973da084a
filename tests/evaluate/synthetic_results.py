"""Synthetic results with the shape and size of a real run, with failures, long names and hostile characters."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from unmask.evaluate.results import (
    Category,
    Cost,
    ModelResult,
    Provenance,
    Results,
    Statistic,
    TaskScore,
    write_example_values,
    write_results,
)
from unmask.evaluate.statistics import bootstrap_interval, score_of

SUBJECT = "unmask/smollm2-135m-embed"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MPNET = "sentence-transformers/all-mpnet-base-v2"
LONG = "an-organisation-with-a-long-name/decoder-1.7b-bidirectional-mntp-simcse-supervised-v2.1"
FAILURE = "ValueError: <b>no vector</b> for text 17 & its neighbours; give the endpoint a larger limit"


@dataclass(frozen=True)
class Task:
    name: str
    category: str
    metric: str
    examples: int
    score: float
    instruction: str = ""
    published: float | None = None  # MiniLM's


_SEMANTIC = "Retrieve semantically similar text."
TASKS = (
    Task("STS12", "STS", "cosine_spearman", 1400, 72.4, _SEMANTIC, 72.37),
    Task("STS13", "STS", "cosine_spearman", 1500, 80.6, _SEMANTIC, 80.60),
    Task("STS16", "STS", "cosine_spearman", 1186, 79.0, _SEMANTIC, 78.99),
    Task("STSBenchmark", "STS", "cosine_spearman", 1379, 82.0, _SEMANTIC, 82.03),
    Task(
        "Banking77Classification", "Classification", "accuracy", 3080, 80.0, "Identify the intent of the query", 80.04
    ),
    Task("SlurpScenarioClassification", "Classification", "accuracy", 2974, 75.8, "Name the scenario of the utterance"),
    Task("SlurpIntentClassification", "Classification", "accuracy", 2974, 67.4, "Name the intent of the utterance"),
    Task("TwentyNewsgroupsLocal", "Clustering", "v_measure", 10, 46.9, "Identify the topic of the news article"),
    Task("StackOverflowLocal", "Clustering", "v_measure", 10, 53.1, "Identify the technology asked about"),
    Task("ArxivTitlesLocal", "Clustering", "v_measure", 10, 38.0, "Identify the subject of the title"),
    Task("ArxivTitleToAbstract", "Retrieval", "ndcg_at_10", 1000, 91.3, "Given a title, find its abstract"),
    Task("QaPassages", "Retrieval", "ndcg_at_10", 600, 64.2, "Given a question, retrieve passages that answer it"),
    Task("Cisi", "Retrieval", "ndcg_at_10", 76, 29.5, "Given a request for information, retrieve documents"),
    Task("WikiQaReranking", "Reranking", "map_at_1000", 243, 77.7, "Given a question, rank the sentences that answer"),
    Task("CoNLL2003Chunking", "WordLevel", "accuracy", 46435, 84.1),
    Task("CoNLL2003NER", "WordLevel", "accuracy", 46435, 94.9),
    Task("CoNLL2003POS", "WordLevel", "accuracy", 46435, 89.3),
    Task("UDEnglishEWT", "WordLevel", "accuracy", 25097, 91.0),
)
# model -> its advantage over MiniLM in points, and what it costs
MODELS = {
    SUBJECT: (
        -1.2,
        Cost(
            tokens_per_second=3_912.4,
            texts_per_second=118.3,
            peak_resident_bytes=1_204_000_000,
            parameters=134_515_008,
            dimensions=576,
            vector_bytes=2304,
        ),
    ),
    MINILM: (
        0.0,
        Cost(
            tokens_per_second=24_118.0,
            texts_per_second=803.9,
            peak_resident_bytes=311_000_000,
            parameters=22_713_216,
            dimensions=384,
            vector_bytes=1536,
        ),
    ),
    MPNET: (
        1.4,
        Cost(
            tokens_per_second=4_902.0,
            texts_per_second=161.2,
            peak_resident_bytes=884_000_000,
            parameters=109_486_464,
            dimensions=768,
            vector_bytes=3072,
        ),
    ),
    LONG: (3.1, Cost(texts_per_second=9.4, dimensions=2048, vector_bytes=8192)),
}
# Models without word-level tasks, and the tasks that fail.
WITHOUT_WORDS = {LONG}
FAILED = {(LONG, "Cisi"), (MPNET, "ArxivTitlesLocal"), (SUBJECT, "UDEnglishEWT")}


def write_synthetic_results(folder: Path, models: tuple[str, ...] = tuple(MODELS), *, seed: int = 0) -> Results:
    """Write results and examples as `unmask evaluate` does, and return them. Same arguments, same numbers."""
    results = Results(
        suites=["local", "words"],
        models=[_model(folder, name, seed) for name in models],
        provenance=Provenance(
            command="unmask evaluate unmask/smollm2-135m-embed --suite local --suite words "
            "--baseline sentence-transformers/all-MiniLM-L6-v2 --data shared/data/eval",
            started="2026-11-02T14:03:11Z",
            seconds=1043.7,
            machine="AMD EPYC 7B13, 2 cores, 8 GB",
            versions={"unmask": "0.1.0", "mteb": "2.26.24", "torch": "2.13.0", "python": "3.11.2"},
            data={task.name: f"{index:016x}" for index, task in enumerate(TASKS, 0xC0FFEE)},
        ),
    )
    write_results(folder, results)
    return results


def _model(folder: Path, name: str, seed: int) -> ModelResult:
    advantage, cost = MODELS[name]
    kind = "unmask" if name == SUBJECT else "endpoint" if name == LONG else "sentence-transformers"
    model = ModelResult(name=name, kind=kind, revision=f"{list(MODELS).index(name):02x}d3adb33f00", cost=cost)
    for index, task in enumerate(TASKS):
        if task.category == "WordLevel" and name in WITHOUT_WORDS:
            continue
        score = TaskScore(
            task=task.name,
            category=cast(Category, task.category),
            metric=task.metric,
            instruction=task.instruction if kind != "sentence-transformers" else "",
            seconds=3.7 * (index + 1),
            data=f"{0xC0FFEE + index:016x}",
        )
        if (name, task.name) in FAILED:
            score.error = FAILURE
        else:
            own = np.random.default_rng((seed, index, list(MODELS).index(name)))
            target = task.score + advantage + own.normal(0, 0.8)
            values, score.statistic = _values(task, target / 100, np.random.default_rng((seed, index)), own)
            score.score = score_of(values, score.statistic)
            score.interval = bootstrap_interval(values, score.statistic)
            score.examples = len(values)
            write_example_values(folder, model.name, task.name, values)
        if name == MINILM and task.published is not None:
            score.published, score.published_source = (
                task.published,
                f"{MINILM} in embeddings-benchmark/results@f4cc6c8",
            )
        model.scores.append(score)
    return model


def _values(
    task: Task, target: float, shared: np.random.Generator, own: np.random.Generator
) -> tuple[np.ndarray, Statistic]:
    """Return values with a score of about `target`; the same examples are hard for all models."""
    hardness = shared.normal(size=task.examples)
    if task.category == "STS":
        gold = np.round(shared.uniform(0, 5, task.examples), 1)
        noise = (0.8 * hardness + 0.6 * own.normal(size=task.examples)) * np.std(gold)
        predicted = target * gold + np.sqrt(1 - target**2) * noise
        return np.stack((predicted / 10, gold), axis=1), "spearman"
    if task.metric == "accuracy":
        difficulty = 0.85 * hardness + 0.53 * own.normal(size=task.examples)
        return (difficulty < np.quantile(difficulty, target)).astype(np.float64), "mean"
    spread = 0.01 if task.category == "Clustering" else 0.3
    values = target + spread * (0.85 * hardness + 0.53 * own.normal(size=task.examples))
    return np.clip(values - values.mean() + target, 0, 1), "mean"
