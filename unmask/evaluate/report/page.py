"""Write a report: one HTML page without external files, and the same in Markdown."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.charts import TEMPLATES, formatting
from unmask.disk import atomic_write
from unmask.evaluate.published_scores import published_models
from unmask.evaluate.report import charts
from unmask.evaluate.report.report_model import CATEGORY_NAMES, ReportModel, build_report_model, comparable_tasks
from unmask.evaluate.results import Results
from unmask.evaluate.statistics import PairedDifference

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, results: Results, *, published: Path | None = None) -> None:
    """Write `report.html` and `report.md` into a folder of results.

    Args:
        folder: folder with `examples/`; without them differences are shown but not tested.
        results: content of `results.json`.
        published: a folder of published scores (see `unmask.evaluate.published_scores`); adds a chart of other people's
            models on the tasks where the data is the same.

    Raises:
        UsageError: there is nothing to report or the published scores cannot be read.
        StorageError: the folder cannot be written.
    """
    other_models = []
    if published is not None:
        names = [model.name for model in results.models]
        other_models = published_models(published, comparable_tasks(results), without=names)
    report = build_report_model(folder, results, other_models)
    write_text(folder / "report.html", render("report.html.j2", **_page_values(report)))
    write_text(folder / "report.md", render("report.md.j2", report=report))


def render(template: str, **values: object) -> str:
    """Render a template of this folder; `values` are escaped for the template's format."""
    return _environment().get_template(template).render(**values)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically. Raises StorageError."""
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


def verdict(test: PairedDifference | None) -> str:
    """Format a verdict, as in `better`, `within noise`."""
    return "not tested" if test is None else "within noise" if test.verdict == "noise" else test.verdict


def _page_values(report: ReportModel) -> dict[str, object]:
    size_chart = charts.size_scatter(report)
    return {
        "report": report,
        "speed_chart": charts.speed_scatter(report, beside=bool(size_chart)),
        "size_chart": size_chart,
        "published_in_chart": len(charts.published_in_chart(report.published, list(report.own_means.values()))),
        "bars": {category: [charts.task_bars(group) for group in tasks] for category, tasks in report.groups.items()},
    }


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader([_TEMPLATES, TEMPLATES]),
        autoescape=select_autoescape(enabled_extensions=("html.j2", "svg.j2"), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        score=formatting.score,
        signed=formatting.signed,
        interval=formatting.interval,
        metric=formatting.metric,
        count=formatting.count,
        magnitude=formatting.magnitude,
        duration=formatting.duration,
        probability=formatting.probability,
        verdict=verdict,
        listed=formatting.listed,
        breakable=formatting.breakable,
        md=formatting.markdown,
        md_inline=formatting.markdown_inline,
        category=lambda name: CATEGORY_NAMES.get(name, name),
        plural=formatting.plural,
        shortened=formatting.shortened,
    )
    return environment
