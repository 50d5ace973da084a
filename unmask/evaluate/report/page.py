"""Write a report: one page that needs nothing but itself, and the same in Markdown."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.charts import TEMPLATES, formatting
from unmask.disk import atomic_write
from unmask.evaluate.published_scores import published_models
from unmask.evaluate.report import charts
from unmask.evaluate.report.report_model import CATEGORY_NAMES, ReportModel, build_report_model, comparable_tasks
from unmask.evaluate.results import Results
from unmask.evaluate.statistics import Paired

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, results: Results, *, published: Path | None = None) -> None:
    """Write `report.html` and `report.md` into a folder of results.

    Args:
        folder: holds `examples/`; without them differences are shown but not tested.
        results: what `results.json` says.
        published: a folder of published scores (see `unmask.evaluate.published_scores`); adds a chart of other people's
            models on the tasks where the data is the same.

    Raises:
        UsageError: there is nothing to report or the published scores cannot be read.
        StorageError: the folder cannot be written.
    """
    others = []
    if published is not None:
        names = [model.name for model in results.models]
        others = published_models(published, comparable_tasks(results), without=names)
    story = build_report_model(folder, results, others)
    write_text(folder / "report.html", render("report.html.j2", **_drawn(story)))
    write_text(folder / "report.md", render("report.md.j2", story=story))


def render(template: str, **values: object) -> str:
    """Fill in a template of this folder; everything in `values` is escaped in the template's own format."""
    return _environment().get_template(template).render(**values)


def write_text(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


def verdict(test: Paired | None) -> str:
    """better"""
    return "not tested" if test is None else "within noise" if test.verdict == "noise" else test.verdict


def _drawn(story: ReportModel) -> dict[str, object]:
    size = charts.size_scatter(story)
    return {
        "story": story,
        "speed_chart": charts.speed_scatter(story, beside=bool(size)),
        "size_chart": size,
        "size_shown": len(charts.shown(story.published, list(story.placed.values()))),
        "bars": {category: [charts.task_bars(group) for group in tasks] for category, tasks in story.groups.items()},
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
