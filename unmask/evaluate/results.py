"""The results of an evaluation: `results.json`, its types, and the per-example values beside it.

A folder of results holds
    results.json                       everything the report shows
    examples/<model>/<task>.npz        one value per example, so that intervals and paired tests need no model
    mteb/<model>/<revision>/*.json     the same scores in mteb's own format, ready to be submitted
    report.html, report.md             the report
"""

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from unmask.disk import atomic_write
from unmask.errors import UsageError

Category = Literal[
    "STS",
    "Classification",
    "Clustering",
    "Retrieval",
    "Reranking",
    "PairClassification",
    "Summarization",
    "WordLevel",
]

# Rules by which a task's score follows from its per-example values:
#   mean      the values' mean x 100 (accuracy, nDCG, average precision, V-measure of one clustering experiment)
#   spearman  rank correlation of two columns x 100, `values` [n, 2]: predicted similarity, gold score
Statistic = Literal["mean", "spearman"]


class TaskScore(msgspec.Struct, kw_only=True):
    """The score of one model on one task, on a 0-100 scale as the field prints them.

    Attributes:
        task: the task's own name, as in mteb where it is mteb's ("STSBenchmark").
        category: kind of task; means are taken within a category first.
        metric: mteb's name of the main score ("cosine_spearman", "ndcg_at_10", "accuracy", "v_measure", ...).
        score: None if the task failed; `error` then says why.
        interval: 95 % bootstrap interval over examples; None without per-example values.
        examples: number of values that the interval is over.
        statistic: rule by which `score` follows from the per-example values.
        instruction: instruction for queries (and for both sides of symmetric tasks); "" for none.
        published: the score published for this model and task, if there is one.
        data: digest of the task's data, 16 hex digits; None for data that mteb fetched.
        details: the other metrics and counts beside the score.
    """

    task: str
    category: Category
    metric: str
    score: float | None = None
    interval: tuple[float, float] | None = None
    examples: int = 0
    statistic: Statistic = "mean"
    instruction: str = ""
    seconds: float = 0.0
    error: str | None = None
    published: float | None = None
    published_source: str | None = None
    data: str | None = None
    details: dict[str, float | int | str] = {}


class Cost(msgspec.Struct, kw_only=True):
    """Cost of a model's vectors on this machine, measured in the same run on the same texts.

    `tokens_per_second` counts tokens of the model's own tokenizer, without padding; `texts_per_second` compares across
    tokenizers. `peak_resident_bytes` is the peak of a process that does nothing but load the model and encode these
    texts, libraries included; None where it is unknown. Older results have a `peak_memory_bytes` instead, which was
    measured beside other models and too low: it is not read.
    """

    tokens_per_second: float | None = None
    texts_per_second: float | None = None
    peak_resident_bytes: int | None = None
    parameters: int | None = None
    dimensions: int = 0
    vector_bytes: int = 0


class ModelResult(msgspec.Struct, kw_only=True):
    """One model under test: identity, scores and cost."""

    name: str
    kind: Literal["unmask", "sentence-transformers", "onnxruntime", "endpoint", "static"]
    revision: str
    cost: Cost
    scores: list[TaskScore] = []
    details: dict[str, str | float | int] = {}

    @property
    def slug(self) -> str:
        """Return a file name for the model."""
        return slug_of(self.name)


class Provenance(msgspec.Struct, kw_only=True):
    """Command, time, machine and versions of a run: enough to run it again."""

    command: str
    started: str  # ISO 8601, UTC
    seconds: float
    machine: str  # processor and number of cores
    versions: dict[str, str]
    data: dict[str, str] = {}  # task -> digest of its data


class Results(msgspec.Struct, kw_only=True):
    """One run of `unmask evaluate`. The first model is the one the report is about."""

    suites: list[str]
    models: list[ModelResult]
    provenance: Provenance
    schema: int = 1


def slug_of(model_name: str) -> str:
    """Return a file name for a model.

    >>> slug_of("unmask/smollm2-135m-embed")
    'unmask-smollm2-135m-embed'
    """
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in model_name).strip("-.")


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json` atomically."""
    with atomic_write(folder / "results.json") as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def read_results(folder: Path) -> Results:
    """Read `results.json` of a folder.

    Raises:
        UsageError: there is none, or it is not one of ours.
    """
    file = folder / "results.json" if folder.is_dir() else folder
    try:
        return msgspec.json.decode(file.read_bytes(), type=Results)
    except OSError as error:
        raise UsageError(f"{folder} holds no results.json; `unmask evaluate` writes one") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{file} is not a result of `unmask evaluate`: {error}") from error


def example_values_file(folder: Path, model_name: str, task: str) -> Path:
    """Return the file for the per-example values of one model on one task."""
    return folder / "examples" / slug_of(model_name) / f"{task}.npz"


def write_example_values(folder: Path, model_name: str, task: str, values: np.ndarray) -> None:
    """Write per-example values: [n] for statistic "mean", [n, 2] for "spearman"."""
    with atomic_write(example_values_file(folder, model_name, task)) as partial, partial.open("wb") as file:
        np.savez_compressed(file, values=values)


def read_example_values(folder: Path, model_name: str, task: str) -> np.ndarray | None:
    """Read the values that `write_example_values` wrote; None if there are none."""
    file = example_values_file(folder, model_name, task)
    if not file.is_file():
        return None
    with np.load(file) as stored:
        return stored["values"]
