"""Published scores of other people, shown beside ours only where the data is the same.

The folder holds `mteb_english_wide.tsv` (a row per task, a column per model, test scores x 100), `model_meta.jsonl`
and `README`, all made from github.com/embeddings-benchmark/results.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from unmask.errors import UsageError
from unmask.tables import read_table

# Offline tasks that read the same rows as MTEB. The other tasks have another split or differently cleaned texts, so
# that a published score beside ours would mislead.
SAME_DATA = frozenset({"STS12", "STS13", "STS16", "STSBenchmark", "Banking77Classification"})

_SCORES = "mteb_english_wide.tsv"


@dataclass(frozen=True)
class PublishedModel:
    """The published record of somebody else's model.

    Attributes:
        name: hub id.
        parameters: of the whole model; None if unpublished.
        mean: mean score (0-100) over the requested tasks.
    """

    name: str
    parameters: int | None
    mean: float


def published_score(
    scores_folder: Path, model_name: str, task: str, *, data_from_mteb: bool = False
) -> tuple[float, str] | None:
    """Return the published score of a model on a task, and its source.

    Args:
        scores_folder: laid out as the module docstring says.
        model_name: name of an `EmbeddingModel`; case does not matter. A hub id is looked up as it is. A bare name or a
            path stands for the one published model whose name without its owner is the last part:
            "all-minilm-l6-v2" is sentence-transformers/all-MiniLM-L6-v2. Two such models, or none: no score.
        task: mteb's name of the task.
        data_from_mteb: the data was fetched by mteb itself, so any task is the published one. Otherwise only tasks in
            SAME_DATA have a published score.

    Returns:
        (score on the 0-100 scale, source), or None.

    Raises:
        UsageError: the folder is not laid out as the module docstring says.
    """
    if task not in SAME_DATA and not data_from_mteb:
        return None
    table = _table(scores_folder)
    model = _published_name(model_name, table)
    if model is None or task not in table[model]:
        return None
    return table[model][task], f"{model} in {_source(scores_folder)}"


def published_models(
    scores_folder: Path, tasks: Sequence[str], *, without: Collection[str] = ()
) -> list[PublishedModel]:
    """Return the models with a published score on every one of `tasks`, best first, with their means over these.

    Args:
        scores_folder: laid out as the module docstring says.
        tasks: mteb names; the caller leaves out those whose data differs (see SAME_DATA).
        without: names of models to skip because they are measured here, in any form that `published_score` takes.

    Raises:
        UsageError: the folder is not laid out as the module docstring says.
    """
    table = _table(scores_folder)
    measured = {_published_name(name, table) for name in without}
    sizes = _parameters(scores_folder)
    models = [
        PublishedModel(name, sizes.get(name), sum(scores[task] for task in tasks) / len(tasks))
        for name, scores in table.items()
        if tasks and name not in measured and all(task in scores for task in tasks)
    ]
    return sorted(models, key=lambda model: -model.mean)


def _published_name(name: str, hub_ids: Collection[str]) -> str | None:
    """Return the hub id that a model name stands for; None if there is none or more than one."""
    folded = name.strip().rstrip("/").casefold()
    for hub_id in hub_ids:
        if hub_id.casefold() == folded:
            return hub_id
    is_hub_id = folded.count("/") == 1 and not folded.startswith((".", "~", "/")) and not Path(name).is_dir()
    if is_hub_id:  # a model of the same name from another owner is another model
        return None
    last_part = folded.rpartition("/")[2]
    namesakes = [hub_id for hub_id in hub_ids if hub_id.casefold().rpartition("/")[2] == last_part]
    return namesakes[0] if len(namesakes) == 1 else None


@cache
def _table(folder: Path) -> dict[str, dict[str, float]]:
    """Return hub id -> task -> score."""
    try:
        rows = [row.fields for row in read_table(folder / _SCORES)]
    except OSError as error:
        raise UsageError(f"--published {folder} holds no {_SCORES}: {error.strerror or error}") from error
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        for column, score in row.items():
            if "__" in column and score:
                table.setdefault(column.replace("__", "/", 1), {})[row["task"]] = float(score)
    if not table:
        raise UsageError(f"{folder / _SCORES} has no column named OWNER__MODEL; is it mteb's English results?")
    return table


@cache
def _parameters(folder: Path) -> dict[str, int]:
    try:
        rows = [row.fields for row in read_table(folder / "model_meta.jsonl")]
    except OSError:  # sizes are an extra; scores do not need them
        return {}
    return {row["name"]: int(row["n_parameters"]) for row in rows if row.get("n_parameters")}


@cache
def _source(folder: Path) -> str:
    readme = folder / "README"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    match = re.search(r"(embeddings-benchmark/results) ?(@\w+)", text)
    return "".join(match.groups()) if match else "embeddings-benchmark/results"
