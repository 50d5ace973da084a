"""Several models side by side, with differing rows and best values marked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from unmask.catalogue.figures import SUITES, Figures
from unmask.catalogue.measurement import LOCAL, MTEB, Measurement, Origin
from unmask.charts import formatting
from unmask.evaluate.report.report_model import CATEGORY_NAMES
from unmask.web.catalogue.model_view import ModelView
from unmask.web.rendering import format_day, format_price

MAX_MODELS = 6

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class ComparisonCell:
    """Value of one model in a row; an empty text means that it is not known."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class ComparisonRow:
    """One property of all models."""

    label: str
    cells: list[ComparisonCell]

    @property
    def differs(self) -> bool:
        """True if two known values are different; unknown values are ignored."""
        return len({cell.text for cell in self.cells if cell.text}) > 1

    @property
    def has_values(self) -> bool:
        return any(cell.text for cell in self.cells)


@dataclass(frozen=True)
class ComparisonSection:
    """Rows of one subject. `note` names the source of their values."""

    title: str
    note: str
    rows: list[ComparisonRow]


def compare_models(models: Sequence[ModelView]) -> list[ComparisonSection]:
    """Return the sections of a comparison, without rows for which no model has a value."""
    sections = [
        ComparisonSection("What they are", "", _specification_rows(models)),
        ComparisonSection(
            "Quality, MTEB English",
            "Means of published scores, 0 to 100. Empty where tasks are missing.",
            _suite_rows(models, MTEB, "published"),
        ),
        ComparisonSection(
            "Quality, measured here",
            "Means over the offline tasks of the suite local, 0 to 100.",
            _suite_rows(models, LOCAL, "measured"),
        ),
        ComparisonSection("Word level", "Accuracy of a linear probe on the frozen model.", _word_level_rows(models)),
        _speed_section([view.figures for view in models]),
    ]
    with_values = [ComparisonSection(s.title, s.note, [row for row in s.rows if row.has_values]) for s in sections]
    return [section for section in with_values if section.rows]


def _specification_rows(models: Sequence[ModelView]) -> list[ComparisonRow]:
    records = [view.record for view in models]
    magnitude, count = formatting.magnitude, formatting.count
    return [
        _texts("Status", [view.display_status for view in models]),
        _texts("Task", [record.task for record in records]),
        _texts("Architecture", [record.architecture for record in records]),
        _texts("Made from", [record.base for record in records]),
        _numbers("Parameters", [record.parameters for record in records], magnitude, "neither"),
        _numbers("Dimensions", [record.dimensions for record in records], count, "neither"),
        _texts("Shorter vectors", [", ".join(map(str, record.matryoshka)) for record in records]),
        _numbers("Tokens per text", [record.max_tokens for record in records], count, "higher"),
        _numbers("Context of the architecture", [record.context for record in records], count, "neither"),
        _texts("Pooling", [record.pooling for record in records]),
        _texts("Query instruction", [record.query_instruction or "none" for record in records]),
        _texts("Languages", [", ".join(record.languages) for record in records]),
        _texts("Licence", [record.licence for record in records]),
        _texts("Licence of the base", [record.base_licence for record in records]),
        _texts("Published", [format_day(record.published) if record.published else None for record in records]),
        _texts("Price per million tokens", [", ".join(map(format_price, record.prices)) for record in records]),
    ]


def _suite_rows(models: Sequence[ModelView], suite: str, origin: Origin) -> list[ComparisonRow]:
    by_model = [view.figures.suites.get((suite, origin)) for view in models]
    means = [scores.mean if scores else None for scores in by_model]
    rows = [_numbers("Mean of all tasks", means, formatting.score, "higher")]
    for at, category in enumerate(SUITES[suite]):
        means = [scores.categories[at].mean if scores else None for scores in by_model]
        rows.append(_numbers(CATEGORY_NAMES.get(category, category), means, formatting.score, "higher"))
    return rows


def _word_level_rows(models: Sequence[ModelView]) -> list[ComparisonRow]:
    names = dict.fromkeys(m.what for view in models for m in view.figures.words)
    return [
        _numbers(
            name,
            [next((m.value for m in view.figures.words if m.what == name), None) for view in models],
            formatting.score,
            "higher",
        )
        for name in names
    ]


def _speed_section(figures: Sequence[Figures]) -> ComparisonSection:
    """Compare speeds and memory. No value is best unless all are from one run: machines and their load differ."""
    speeds = [f.texts_per_second for f in figures]
    runs = {(m.hardware, m.command, m.on) for m in speeds if m}
    one_run = len(runs) == 1
    note = (
        "".join(f"On {hardware}, in one run." for hardware, _, _ in runs)
        if one_run
        else "Not measured in one run, so these speeds cannot be compared."
    )
    higher: Better = "higher" if one_run else "neither"
    lower: Better = "lower" if one_run else "neither"
    tokens, memory = [f.tokens_per_second for f in figures], [f.peak_memory for f in figures]
    return ComparisonSection(
        "Speed and memory, measured here",
        note,
        [
            _numbers("Texts per second", _values(speeds), formatting.count, higher),
            _numbers("Tokens per second", _values(tokens), formatting.count, higher),
            _numbers("Peak memory", _values(memory), _format_bytes, lower),
        ],
    )


def _texts(label: str, values: Sequence[str | None]) -> ComparisonRow:
    return ComparisonRow(label, [ComparisonCell(value or "") for value in values])


def _numbers(
    label: str, values: Sequence[float | None], format_value: Callable[[float | None], str], better: Better
) -> ComparisonRow:
    numbers = [value for value in values if value is not None]
    best = None
    if better != "neither" and len(numbers) > 1 and min(numbers) != max(numbers):
        best = max(numbers) if better == "higher" else min(numbers)
    cells = [
        ComparisonCell("" if value is None else format_value(value), value is not None and value == best)
        for value in values
    ]
    return ComparisonRow(label, cells)


def _format_bytes(value: float | None) -> str:
    return formatting.magnitude(value, "B")


def _values(measurements: Sequence[Measurement | None]) -> list[float | None]:
    return [measurement.value if measurement else None for measurement in measurements]
