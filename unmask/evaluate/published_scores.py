"""Scores that others published, beside ours only where the data is the same.

Reads a folder with `mteb_english_wide.tsv` (a row per task, a column per model, test scores x 100), `model_meta.jsonl`
and `README`, made from github.com/embeddings-benchmark/results.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from unmask.errors import UsageError
from unmask.tables import read_table

# The offline tasks whose data is MTEB's own, to the last row. Others bear other names or have other data (a different
# split, or texts that were cleaned differently), and a published score beside them would compare unlike with unlike.
SAME_DATA = frozenset({"STS12", "STS13", "STS16", "STSBenchmark", "Banking77Classification"})

_SCORES = "mteb_english_wide.tsv"


@dataclass(frozen=True)
class PublishedModel:
    """What is known of somebody else's model.

    Attributes:
        name: hub id.
        parameters: of the whole model; None where nobody stated them.
        mean: mean score (0-100) over the tasks that were asked for.
    """

    name: str
    parameters: int | None
    mean: float


def published_score(
    scores_folder: Path, model_name: str, task: str, *, data_from_mteb: bool = False
) -> tuple[float, str] | None:
    """The published score of a model on a task, and where it is from.

    Args:
        scores_folder: laid out as the module says.
        model_name: as contenders have it. A hub id is looked up as it is, whatever its case. A bare name or a folder's
            path stands for the one published model whose name without its owner is the folder's last part, whatever
            its case: "all-minilm-l6-v2" is sentence-transformers/all-MiniLM-L6-v2. Two such models, or none: no score.
        task: mteb's name of the task.
        data_from_mteb: the data was fetched by mteb itself, so any task is the published one. Otherwise only tasks in
            SAME_DATA have a published score.

    Returns:
        (score on the 0-100 scale, source), or None.

    Raises:
        UsageError: the folder is not laid out as the module says.
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
    """The models with a published score on every one of `tasks`, best first, their means over exactly these.

    Args:
        scores_folder: laid out as the module says.
        tasks: mteb names; those whose data differs are the caller's to leave out (see SAME_DATA).
        without: names of models that are measured here and so need no second mark, in any form that
            `published_score` takes.

    Raises:
        UsageError: the folder is not laid out as the module says.
    """
    table = _table(scores_folder)
    measured = {_published_name(name, table) for name in without}
    sizes = _parameters(scores_folder)
    found = [
        PublishedModel(name, sizes.get(name), sum(scores[task] for task in tasks) / len(tasks))
        for name, scores in table.items()
        if tasks and name not in measured and all(task in scores for task in tasks)
    ]
    return sorted(found, key=lambda model: -model.mean)


def _published_name(name: str, table: Collection[str]) -> str | None:
    wanted = name.strip().rstrip("/").casefold()
    for known in table:
        if known.casefold() == wanted:
            return known
    is_hub_id = wanted.count("/") == 1 and not wanted.startswith((".", "~", "/")) and not Path(name).is_dir()
    if is_hub_id:  # somebody else's model of the same name is another model
        return None
    last = wanted.rpartition("/")[2]
    namesakes = [known for known in table if known.casefold().rpartition("/")[2] == last]
    return namesakes[0] if len(namesakes) == 1 else None


@cache
def _table(folder: Path) -> dict[str, dict[str, float]]:
    """Hub id -> task -> score."""
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
    found = re.search(r"(embeddings-benchmark/results) ?(@\w+)", text)
    return "".join(found.groups()) if found else "embeddings-benchmark/results"
