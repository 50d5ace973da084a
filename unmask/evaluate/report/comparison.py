"""A comparison of two models in words, in the terminal and in files."""

from pathlib import Path

import msgspec

from unmask.charts import formatting
from unmask.errors import UsageError
from unmask.evaluate.compare import Comparison, TaskComparison, VectorDrift
from unmask.evaluate.report.page import render, write_text
from unmask.terminal import print_result, print_sentence, print_table

_FORMATS = (".html", ".md", ".json")


def verdict_sentence(comparison: Comparison) -> str:
    """Say which model is better, by how much, and if the difference is more than noise."""
    over = f"on the mean of {formatting.plural(len(comparison.counted), 'task')}"
    delta, test = comparison.delta, comparison.overall
    better, other = (comparison.a, comparison.b) if delta > 0 else (comparison.b, comparison.a)
    highest, lowest = sorted((comparison.mean_a, comparison.mean_b), reverse=True)
    means = f"{formatting.score(highest)} against {formatting.score(lowest)}"
    if test is None:
        if delta == 0:
            return f"{comparison.a} and {comparison.b} score the same {over}, {means}; no per-example values to test."
        unknown = "without per-example values nobody knows whether that is noise"
        return f"{better} scores {abs(delta):.2f} points more than {other} {over}, {means}; {unknown}."
    low, high = sorted(bound if delta > 0 else -bound for bound in test.interval)
    test_text = f"95 % interval {formatting.signed(low)} to {formatting.signed(high)}, p {_p_value(test.p_value)}"
    if test.verdict == "noise":
        return f"{better} cannot be told from {other} {over}: {means}, a difference within noise ({test_text})."
    return (
        f"{better} is better than {other} {over}, by {abs(delta):.2f} points: {means}, more than noise ({test_text})."
    )


def tally_sentence(comparison: Comparison) -> str:
    """Count the tasks on which each model is better."""
    tested = [row.test for row in comparison.tasks if row.test is not None]
    wins = {verdict: sum(test.verdict == verdict for test in tested) for verdict in ("better", "worse", "noise")}
    parts = [
        f"{comparison.a} is better on {wins['better']}",
        f"{comparison.b} on {wins['worse']}",
        f"{wins['noise']} are within noise",
    ]
    if len(tested) < len(comparison.tasks):
        parts.append(f"{len(comparison.tasks) - len(tested)} could not be tested")
    return (
        f"Of {formatting.plural(len(comparison.tasks), 'task')}, {formatting.listed(parts)} (Holm's correction, 5 %)."
    )


def drift_sentence(drift: VectorDrift) -> str:
    """Say how far the vectors moved."""
    over = f"{formatting.plural(drift.texts, 'text')}"
    near = (
        f"{100 * drift.overlap:.1f} % of the {drift.neighbours} nearest neighbours are the same, "
        f"and the nearest one for {100 * drift.same_nearest:.1f} % of the texts"
    )
    if drift.mean_cosine is None or drift.worst_cosine is None:
        return f"{drift.a} and {drift.b} have vectors of different lengths, so no cosine; over {over}, {near}."
    cosines = f"cosine {drift.mean_cosine:.4f} on average, {drift.worst_cosine:.4f} at worst"
    return f"From {drift.a} to {drift.b}, over {over}: {cosines}; {near}."


def print_comparison(comparison: Comparison) -> None:
    """Print the verdict and a table of tasks."""
    print_sentence(verdict_sentence(comparison))
    print_sentence(tally_sentence(comparison))
    print_result(f"\nA  {comparison.a}\nB  {comparison.b}\n")
    rows = [
        (row.task, formatting.score(row.score_a), formatting.score(row.score_b), *_test_cells(row))
        for row in comparison.tasks
    ]
    headings = ("task", "A", "B", "A − B", "95 % interval", "p", "verdict")
    print_table(headings, rows, right=headings[1:-1])
    for task, reason in comparison.left_out.items():
        print_sentence(f"{task} is left out: {reason}")


def print_drift(drift: VectorDrift) -> None:
    """Print how far the vectors moved."""
    print_sentence(drift_sentence(drift))
    if drift.worst_text is not None:
        print_sentence(f"Moved most: {formatting.shortened(' '.join(drift.worst_text.split()), 200)}")


def print_comparison_json(comparison: Comparison | None, drift: VectorDrift | None) -> None:
    """Print a comparison, a drift or both as JSON: the content of a .json file of `write_comparison`."""
    print_result(_as_json(comparison, drift))


def output_file(name: str) -> Path:
    """Check the name of an output file before any work is done.

    Raises:
        UsageError: the name does not end in .html, .md or .json.
    """
    if Path(name).suffix.lower() not in _FORMATS:
        raise UsageError(f"--output {name}: end the name in {formatting.listed(_FORMATS, 'or')}")
    return Path(name)


def write_comparison(file: Path, comparison: Comparison | None, drift: VectorDrift | None = None) -> None:
    """Write a comparison, a drift or both in the format of the file's name.

    Raises:
        UsageError: as `output_file`.
        StorageError: the file cannot be written.
    """
    suffix = output_file(str(file)).suffix.lower()
    if suffix == ".json":
        write_text(file, _as_json(comparison, drift) + "\n")
        return
    sentences = [verdict_sentence(comparison), tally_sentence(comparison)] if comparison else []
    sentences += [drift_sentence(drift)] if drift else []
    models = comparison or drift
    if models is None:
        raise ValueError("neither a comparison nor a drift to write")
    values = {
        "sentences": sentences,
        "comparison": comparison,
        "drift": drift,
        "a": models.a,
        "b": models.b,
        "short": formatting.short_names([models.a, models.b]),
        "rows": [(row, _test_cells(row)) for row in comparison.tasks] if comparison else [],
    }
    write_text(file, render(f"comparison{suffix}.j2", **values))


def _as_json(comparison: Comparison | None, drift: VectorDrift | None) -> str:
    content = {"comparison": comparison, "drift": drift}
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode()


def _test_cells(row: TaskComparison) -> tuple[str, str, str, str]:
    """Return difference, interval, p and verdict as text."""
    test = row.test
    if test is None:
        return formatting.signed(row.delta), formatting.NO_FIGURE, formatting.NO_FIGURE, "not tested"
    low, high = test.interval
    bounds = f"{formatting.signed(low)} to {formatting.signed(high)}"
    words = {"better": "A better", "worse": "B better", "noise": "noise"}
    return formatting.signed(row.delta), bounds, formatting.probability(test.p_value), words[test.verdict]


def _p_value(value: float) -> str:
    text = formatting.probability(value)
    return text if text.startswith("<") else f"= {text}"
