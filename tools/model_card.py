"""The card of a model that ships: a template, filled from the run, the evaluation and the record."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from unmask.catalogue import Record
from unmask.errors import UsageError
from unmask.evaluate.results import ModelResult, Results, TaskScore

HERE = Path(__file__).parent


@dataclass(frozen=True)
class DataRow:
    """A data set of the card's table.

    Attributes:
        used: examples that the run could draw.
        dropped: rows left out because they overlap with evaluation data.
    """

    name: str
    what: str
    licence: str
    used: int
    dropped: int


@dataclass(frozen=True)
class ScoreRow:
    """A model of the card's table: means over the common tasks, by kind in the order of the table."""

    label: str
    mean: float
    means: Sequence[float]
    sts: float | None


@dataclass(frozen=True)
class Measured:
    """The results of a model, and those of the same weights in other lengths and precisions."""

    plain: ModelResult
    variants: Mapping[str, ModelResult]


def data_table(run: Mapping[str, Any], tables: Mapping[str, Any]) -> list[DataRow]:
    """Return the data sets of a run with their licences.

    Args:
        run: content of `run.json`.

    Raises:
        UsageError: a set has no known or no clear licence, or the run does not count its rows.
    """
    rows, reasons = [], []
    for source in run["recipe"]["data"]:
        entry = tables["data"].get(source["path"])
        if entry is None:
            reasons.append(f"{source['path']} has no entry; add what it is and its licence")
            continue
        if "unclear" in entry:
            reasons.append(f"{source['path']}: {entry['unclear']}, so no model that ships may learn from it")
        for column, values in entry.get("leave_out", {}).items():
            chosen = source["only"].get(column)
            is_left_out = set(values) <= set(source["without"].get(column, ()))
            if not is_left_out and (chosen is None or set(values) & set(chosen)):
                reasons.append(f"{source['path']}: the recipe must leave out {column} = {values}")
        counts = run.get("rows", {}).get(source["name"])
        if counts is None:
            reasons.append(f"run.json does not count the rows of {source['name']!r}; train with this version")
            continue
        what, licence = describe_source(source, entry)
        rows.append(DataRow(source["name"], what, licence, counts["train"], counts["overlapping"]))
    if reasons:
        raise UsageError("training data (tools/training_data.toml):\n  " + "\n  ".join(reasons))
    return rows


def describe_source(source: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a data set is and its licence, of those parts of its file alone that the recipe uses.

    Args:
        source: a data set of a recipe, with `only` and `without`.
        entry: of the file, in `training_data.toml`.
    """
    if "parts" not in entry:
        return entry["what"], entry["licence"]
    only, without = source["only"].get(entry["column"]), source["without"].get(entry["column"], ())
    parts = [
        part
        for part in entry["parts"]
        if not set(part["values"]) <= set(without) and (only is None or set(part["values"]) & set(only))
    ]
    names = ", ".join(part["what"] for part in parts)
    return entry["what"].format(parts=names), ", ".join(part["licence"] for part in parts)


def teachers_of(recipe: Mapping[str, Any], tables: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return name, url, licence and nearness to the suite of each teacher.

    Raises:
        UsageError: a teacher has no entry.
    """
    settings = recipe.get("distillation") or {}
    models = [teacher["model"] for teacher in settings.get("teachers") or ()]
    if settings.get("teacher"):
        models.append(settings["teacher"])
    names = [model.partition("?")[0].rsplit("/", 1)[-1].removeprefix("st:") for model in models]
    missing = [name for name in names if name not in tables["teachers"]]
    if missing:
        raise UsageError(f"tools/training_data.toml has no entry for the teacher {missing[0]}; add its licence")
    return [{"name": name, **tables["teachers"][name]} for name in names]


def find_measured(results: Results, weights: str) -> Measured:
    """Find the results of a model by the digest of its weights.

    Args:
        weights: `Checkpoint.revision`, with which the revision of a result begins.

    Raises:
        UsageError: these weights were not evaluated in float32 and full length.
    """
    plain, variants = None, {}
    for model in results.models:
        digest, _, settings = model.revision.partition("-")
        if digest != weights:
            continue
        length = settings.partition("-")[2].removeprefix("first")
        precision = str(model.details.get("precision", "float32"))
        if not length and precision == "float32":
            plain = model
        else:
            variants[f"first {length} numbers" if length else precision] = model
    if plain is None:
        raise UsageError(
            f"the results hold no float32 evaluation of the weights {weights}; run unmask evaluate on this very folder"
        )
    return Measured(plain, variants)


def score_table(results: Results, measured: Measured) -> tuple[list[tuple[str, int]], list[ScoreRow], list[str], int]:
    """Return kinds with their numbers of tasks, rows, sentences of differences, and the number of common tasks."""
    own = {id(measured.plain): "this model"}
    own |= {id(model): f"the same, {variant}" for variant, model in measured.variants.items()}
    models = [measured.plain, *measured.variants.values()]
    models += [model for model in results.models if id(model) not in own]
    scores = [_sentence_level(model) for model in models]
    common = [task for task in scores[0] if all(task in other for other in scores)]
    if not common:
        raise UsageError("no task was completed by every model of the results; name the models that belong together")
    kinds = list(dict.fromkeys(scores[0][task].category for task in common))
    rows = []
    for model, by_task in zip(models, scores, strict=True):
        figures = {task: by_task[task].score or 0.0 for task in common}
        means = [_mean([figures[task] for task in common if scores[0][task].category == kind]) for kind in kinds]
        label = own.get(id(model), model.name)
        rows.append(ScoreRow(label, _mean(list(figures.values())), means, figures.get("STSBenchmark")))
    differences = [_difference(rows[0], row) for row in rows[1 : len(own)]]
    counts = [(str(kind), sum(scores[0][task].category == kind for task in common)) for kind in kinds]
    return counts, rows, differences, len(common)


def _sentence_level(model: ModelResult) -> dict[str, TaskScore]:
    return {s.task: s for s in model.scores if s.score is not None and s.category != "WordLevel"}


def _difference(plain: ScoreRow, row: ScoreRow) -> str:
    """Return a sentence on a variant, such as `the same, first 256 numbers: mean -0.31, STSBenchmark -0.12`."""
    sts = "" if row.sts is None or plain.sts is None else f", STSBenchmark {row.sts - plain.sts:+.2f}"
    return f"{row.label.removeprefix('the same, ')}: mean {row.mean - plain.mean:+.2f}{sts}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def learning_of(folder: Path, exit_layers: int | None) -> tuple[int, int, str]:
    """Return steps, tokens and a sentence on the choice of the weights, from the metrics beside a result folder.

    Args:
        exit_layers: for the weights of an exit, its number of layers.
    """
    file = folder.parent / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "scores" in line]
    last, chosen = max(line["step"] for line in lines), ""
    if is_best(folder) and evaluations:
        best = max(evaluations, key=lambda line: _mean(list(line["scores"].values())))
        last = best["step"]
        scores = best["scores"] if exit_layers is None else best["exits"][str(exit_layers)]
        figures = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        chosen = f"the best of {len(evaluations)} evaluations on dev sets, after step {last:,}: {figures}"
        if exit_layers is not None:
            chosen += "; the full model's scores decided"
    tokens = sum(line["tokens"] for line in lines if "loss" in line and line["step"] <= last)
    return last, tokens, chosen


def is_best(folder: Path) -> bool:
    """True for the weights that dev sets chose: `best` of a run, one of its exits, or a copy of `best`."""
    own, best = (part / "model.safetensors" for part in (folder, folder.parent / "best"))
    is_copy = best.is_file() and own.read_bytes() == best.read_bytes()
    return folder.name.startswith("best") or is_copy


def decoder_depth(folder: Path) -> int:
    """Return the number of layers that a run trained; a result folder of it may be an exit with fewer."""
    results = [folder.parent / name / "config.json" for name in ("best", "model", folder.name)]
    present = [json.loads(file.read_text(encoding="utf-8")) for file in results if file.is_file()]
    return max(int(config["num_hidden_layers"]) for config in present)


def objective_of(recipe: Mapping[str, Any]) -> str:
    """Return the losses with their weights as a sentence."""
    parts, settings = [], recipe.get("distillation") or {}
    if settings.get("vector_weight"):
        parts.append(f"the teachers' vectors, cosine, weight {settings['vector_weight']:g}")
    if settings and settings.get("weight"):
        parts.append(f"their similarities within a batch, weight {settings['weight']:g}")
    contrast = recipe["contrastive"]["weight"]
    if recipe["objective"] == "supervised" and contrast:
        parts.append(f"InfoNCE with labels, weight {contrast:g}")
    return "; ".join(parts) or recipe["objective"]


def render_card(
    record: Record,
    run: Mapping[str, Any],
    folder: Path,
    results: Results,
    measured: Measured,
    report: str,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the text of a model card.

    Args:
        run: content of `run.json`.
        folder: result folder of the run, with the metrics beside it.
        report: path of the evaluation's report in the repository.
        earlier: contents of `run.json` of the runs whose result this one began with, first to last.

    Raises:
        UsageError: as `data_table`, `teachers_of` and `score_table`.
    """
    tables = tomllib.loads((HERE / "training_data.toml").read_text(encoding="utf-8"))
    recipe, config = run["recipe"], json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = int(config["num_hidden_layers"])
    deepest = int(recipe["layers"] if isinstance(recipe.get("layers"), int) else decoder_depth(folder))
    runs = [*earlier, run]
    steps, tokens, dev = learning_of(folder, layers if layers != deepest else None)
    kinds, rows, differences, tasks = score_table(results, measured)
    words = [score for score in measured.plain.scores if score.category == "WordLevel" and score.score is not None]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((HERE / "model_card.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        record=record, recipe=recipe, earlier=[each["recipe"] for each in earlier],
        layers=layers, deepest=deepest, embedding_from=config["token_embedding_from"],
        megabytes=f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f}",
        tasks=tasks, kinds=kinds, rows=rows, differences=differences, sts=rows[0].sts is not None, report=report,
        words=", ".join(f"{score.task} {score.score:.2f}" for score in words),
        objective=objective_of(recipe), steps=steps, tokens=tokens, dev=dev,
        hardware=run["hardware"], precision=run["precision"],
        teachers=teachers_of(recipe, tables), decontaminated=bool(recipe.get("decontaminate_against")),
        data=[(each["recipe"], data_table(each, tables)) for each in runs],
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
