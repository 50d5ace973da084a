"""Several models side by side, with what differs and what is best marked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import QueryParams

from unmask.api.errors import ApiError
from unmask.catalogue.figures import SUITES, Figures
from unmask.catalogue.measurement import LOCAL, MTEB, Measurement, Origin
from unmask.charts import formatting
from unmask.evaluate.report.report_model import CATEGORY_NAMES
from unmask.web.catalogue.model_view import Shown
from unmask.web.rendering import day, price

MOST = 6

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Cell:
    """What one model has in a row; an empty text is not known."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One property across the models."""

    label: str
    cells: list[Cell]

    @property
    def differs(self) -> bool:
        """Whether two known values are different; one that is not known differs from nothing."""
        return len({cell.text for cell in self.cells if cell.text}) > 1

    @property
    def known(self) -> bool:
        return any(cell.text for cell in self.cells)


@dataclass(frozen=True)
class Section:
    """Rows that belong together. `note` says where their values are from."""

    title: str
    note: str
    rows: list[Row]


def chosen_ids(params: QueryParams) -> list[str]:
    """Ids from `models=a,b` and from `models=a&models=b`, each once.

    Raises:
        ApiError: 400, there are more than fit on a page.
    """
    given = [id.strip() for value in params.getlist("models") for id in value.split(",")]
    ids = list(dict.fromkeys(id for id in given if id))
    if len(ids) > MOST:
        raise ApiError(400, f"models names {len(ids)} models: compare at most {MOST}.", param="models", code="too_many")
    return ids


def compare(models: Sequence[Shown]) -> list[Section]:
    """The sections of a comparison; rows that nobody has a value for are left out."""
    records = [shown.record for shown in models]
    sections = [
        Section(
            "What they are",
            "",
            [
                _texts("Status", [shown.standing for shown in models]),
                _texts("Task", [record.task for record in records]),
                _texts("Architecture", [record.architecture for record in records]),
                _texts("Made from", [record.base for record in records]),
                _numbers("Parameters", [r.parameters for r in records], formatting.magnitude, "neither"),
                _numbers("Dimensions", [r.dimensions for r in records], formatting.count, "neither"),
                _texts("Shorter vectors", [", ".join(map(str, record.matryoshka)) for record in records]),
                _numbers("Tokens per text", [r.max_tokens for r in records], formatting.count, "higher"),
                _numbers("Context of the architecture", [r.context for r in records], formatting.count, "neither"),
                _texts("Pooling", [record.pooling for record in records]),
                _texts("Query instruction", [record.query_instruction or "none" for record in records]),
                _texts("Languages", [", ".join(record.languages) for record in records]),
                _texts("Licence", [record.licence for record in records]),
                _texts("Licence of the base", [record.base_licence for record in records]),
                _texts("Published", [day(record.published) if record.published else None for record in records]),
                _texts("Price per million tokens", [", ".join(map(price, record.prices)) for record in records]),
            ],
        ),
        Section(
            "Quality, MTEB English",
            "Means of published scores, 0 to 100. Empty where tasks are missing.",
            _suite(models, MTEB, "published"),
        ),
        Section(
            "Quality, measured here",
            "Means over the offline tasks of the suite local, 0 to 100.",
            _suite(models, LOCAL, "measured"),
        ),
        Section("Word level", "Accuracy of a linear probe on the frozen model.", _words(models)),
        _speed([shown.figures for shown in models]),
    ]
    kept = [Section(s.title, s.note, [row for row in s.rows if row.known]) for s in sections]
    return [section for section in kept if section.rows]


def _suite(models: Sequence[Shown], suite: str, origin: Origin) -> list[Row]:
    found = [shown.figures.suites.get((suite, origin)) for shown in models]
    means = [scores.mean if scores else None for scores in found]
    rows = [_numbers("Mean of all tasks", means, formatting.score, "higher")]
    for at, category in enumerate(SUITES[suite]):
        means = [scores.categories[at].mean if scores else None for scores in found]
        rows.append(_numbers(CATEGORY_NAMES.get(category, category), means, formatting.score, "higher"))
    return rows


def _words(models: Sequence[Shown]) -> list[Row]:
    names = dict.fromkeys(m.what for shown in models for m in shown.figures.words)
    return [
        _numbers(
            name,
            [next((m.value for m in shown.figures.words if m.what == name), None) for shown in models],
            formatting.score,
            "higher",
        )
        for name in names
    ]


def _speed(figures: Sequence[Figures]) -> Section:
    """Speeds and memory. Of several runs none is best: their machines were not the same, or not equally busy."""
    timed = [f.texts_per_second for f in figures]
    runs = {(m.hardware, m.command, m.on) for m in timed if m}
    one = len(runs) == 1
    note = (
        "".join(f"On {hardware}, in one run." for hardware, _, _ in runs)
        if one
        else ("Not measured in one run, so these speeds cannot be compared.")
    )
    return Section(
        "Speed and memory, measured here",
        note,
        [
            _numbers("Texts per second", [_value(m) for m in timed], formatting.count, "higher" if one else "neither"),
            _numbers(
                "Tokens per second",
                [_value(f.tokens_per_second) for f in figures],
                formatting.count,
                "higher" if one else "neither",
            ),
            _numbers("Peak memory", [_value(f.peak_memory) for f in figures], _bytes, "lower" if one else "neither"),
        ],
    )


def _texts(label: str, values: Sequence[str | None]) -> Row:
    return Row(label, [Cell(value or "") for value in values])


def _numbers(label: str, values: Sequence[float | None], written: Callable[[float | None], str], better: Better) -> Row:
    known = [value for value in values if value is not None]
    best = None
    if better != "neither" and len(known) > 1 and min(known) != max(known):
        best = max(known) if better == "higher" else min(known)
    return Row(label, [Cell("" if v is None else written(v), v is not None and v == best) for v in values])


def _bytes(value: float | None) -> str:
    return formatting.magnitude(value, "B")


def _value(measurement: Measurement | None) -> float | None:
    return measurement.value if measurement else None
