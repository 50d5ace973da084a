"""The report shows every figure of the results, in sound HTML and Markdown, and fits a phone."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.synthetic_results import (
    FAILED,
    FAILURE,
    MINILM,
    MODELS,
    MPNET,
    SUBJECT,
    TASKS,
    write_synthetic_results,
)
from unmask.errors import UsageError
from unmask.evaluate.published_scores import SAME_DATA, PublishedModel
from unmask.evaluate.report import write_report
from unmask.evaluate.report.charts import size_scatter, speed_scatter, task_bars
from unmask.evaluate.report.report_model import build_report_model
from unmask.evaluate.results import (
    Category,
    Cost,
    ModelResult,
    Provenance,
    Results,
    TaskScore,
    read_results,
    write_example_values,
)

COMMON = [t.name for t in TASKS if t.category != "WordLevel" and not any((m, t.name) in FAILED for m in MODELS)]
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "col"}


class Page(HTMLParser):
    """Parse a page into text, attributes, and faults such as elements that are closed in the wrong place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.faults: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if len(attrs) != len(dict(attrs)):
            self.faults.append(f"<{tag}> repeats an attribute")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else, line {self.getpos()[0]}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("run")
    return folder, write_synthetic_results(folder)


@pytest.fixture(scope="module")
def html(run: tuple[Path, Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, _ = run
    write_report(folder, read_results(folder), published=published_scores(tmp_path_factory.mktemp("scores")))
    return (folder / "report.html").read_text(encoding="utf-8")


def published_scores(folder: Path) -> Path:
    """Write published scores of thirty models on the tasks that all have."""
    columns = [f"owner__model-of-size-{size}" for size in range(30)]
    lines = ["\t".join(("category", "task", *columns))]
    for task in SAME_DATA:
        figures = (f"{68 + 14 * (size * 7 % 30) / 30:.2f}" for size in range(30))
        lines.append("\t".join(("STS", task, *figures)))
    (folder / "mteb_english_wide.tsv").write_text("\n".join(lines), encoding="utf-8")
    sizes = ({"name": name.replace("__", "/"), "n_parameters": int(1e6 * 1.4**n)} for n, name in enumerate(columns))
    (folder / "model_meta.jsonl").write_text("\n".join(map(json.dumps, sizes)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def markdown(run: tuple[Path, Results], html: str) -> str:
    return (run[0] / "report.md").read_text(encoding="utf-8")


def mean_of(results: Results, name: str) -> float:
    model = next(model for model in results.models if model.name == name)
    return float(np.mean([score.score or 0 for score in model.scores if score.task in COMMON]))


def table_rows(markdown: str, heading: str) -> list[list[str]]:
    part = markdown.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def tiny(*models: tuple[str, Mapping[str, float | None]], category: Category = "STS") -> Results:
    """Return results without per-example values."""
    return Results(
        suites=["local"],
        models=[
            ModelResult(
                name=name,
                kind="unmask",
                revision="0",
                cost=Cost(),
                scores=[
                    TaskScore(
                        task=task, category=category, metric="accuracy", score=score, error=None if score else "no"
                    )
                    for task, score in scores.items()
                ],
            )
            for name, scores in models
        ],
        provenance=Provenance(command="unmask evaluate", started="2026-11-02", seconds=1.0, machine="m", versions={}),
    )


def answer_text(results: Results, folder: Path) -> str:
    """Return the opening of the report as text."""
    return " ".join("".join(span.text for span in sentence) for sentence in build_report_model(folder, results).answer)


def test_the_answer_comes_first_and_is_honest(run: tuple[Path, Results], html: str, markdown: str) -> None:
    _, results = run
    gap = mean_of(results, MPNET) - mean_of(results, SUBJECT)
    assert gap > 0
    for text in (Page(html).text, markdown.replace("*", "")):
        answer = text[: text.index("Quality")].replace("\N{NO-BREAK SPACE}", " ")
        assert (
            f"{SUBJECT} averages {mean_of(results, SUBJECT):.1f} over the 12 tasks that all 4 models completed"
            in answer
        )
        assert f"{gap:.1f} below all-mpnet-base-v2, more than noise (" in answer
        assert "118 texts/s" in answer and "6.8 times slower than all-MiniLM-L6-v2" in answer
        assert "1.2 GB of memory with all libraries and 2,304 bytes per vector" in answer
        assert "3 tasks failed and are not counted" in answer


def test_memory_of_older_results_is_left_out(run: tuple[Path, Results], tmp_path: Path) -> None:
    folder, results = run
    text = (folder / "results.json").read_text(encoding="utf-8")
    assert "Peak memory is that of a process" in (folder / "report.md").read_text(encoding="utf-8")
    (tmp_path / "results.json").write_text(text.replace("peak_resident_bytes", "peak_memory_bytes"), encoding="utf-8")
    older = read_results(tmp_path)
    assert {model.cost.peak_resident_bytes for model in older.models} == {None}
    write_report(tmp_path, older)
    for name in ("report.md", "report.html"):
        report = (tmp_path / name).read_text(encoding="utf-8")
        assert "of memory" not in report and "Peak memory is" not in report and "1.2 GB" not in report
    assert len(results.models) == len(older.models)


def test_a_difference_within_noise_is_called_that(tmp_path: Path) -> None:
    results = tiny(("a", {"x": 50.0}), ("b", {"x": 50.4}))
    generator = np.random.default_rng(0)
    for model in results.models:
        model.scores[0].score = 100 * float((values := generator.random(50)).mean())
        write_example_values(tmp_path, model.name, "x", values)
    assert "which is within noise (95" in answer_text(results, tmp_path)


def test_what_is_not_tested_is_said(tmp_path: Path) -> None:
    answer = answer_text(tiny(("a", {"x": 60.0, "y": 70.0}), ("b", {"x": 50.0, "y": None})), tmp_path)
    assert "a averages 60.0 over the 1 task that both models completed" in answer
    assert "10.0 points above b (without per-example values, so not tested)" in answer


def test_data_that_does_not_match_costs_the_tests_and_not_the_report(tmp_path: Path) -> None:
    results = tiny(("a", {"x": 60.0}), ("b", {"x": 50.0}))
    results.models[1].scores[0].data = "f" * 16
    write_report(tmp_path, results)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Not tested. x: a was measured with data None and b with ffffffffffffffff" in text and "50.00" in text


def test_a_model_alone_and_models_that_failed(tmp_path: Path) -> None:
    assert answer_text(tiny(("a", {"x": 60.0})), tmp_path).startswith("a averages 60.0 over 1 task.")
    assert "a completed no task" in answer_text(tiny(("a", {"x": None}), ("b", {"x": 50.0})), tmp_path)
    assert "shares no completed task" in answer_text(
        tiny(("a", {"x": 1.0, "y": None}), ("b", {"x": None, "y": 2.0})), tmp_path
    )
    report = build_report_model(tmp_path, tiny(("a", {"x": 60.0}), ("b", {"x": None})))
    assert report.unmeasured == ["b"] and report.common == ["x"] and report.rows[1].mean is None
    with pytest.raises(UsageError, match="no model"):
        build_report_model(tmp_path, tiny())
    for results in (tiny(("a", {"x": None})), tiny(("a", {})), tiny(("a", {"x": 5.0}), ("b", {"y": 4.0}))):
        write_report(tmp_path, results)
        assert not Page((tmp_path / "report.html").read_text(encoding="utf-8")).faults


def test_many_rivals_are_counted(tmp_path: Path) -> None:
    answer = answer_text(tiny(*((name, {"x": 50.0 + ord(name)}) for name in "abcdef")), tmp_path)
    assert "Of the 5 other models it is better than 0, worse than 0 and not told apart from 5" in answer
    assert "The best of them is f, 5.0 points above" in answer


def test_word_level_alone_is_the_answer_then(tmp_path: Path) -> None:
    report = build_report_model(tmp_path, tiny(("a", {"CoNLL2003NER": 90.0}), category="WordLevel"))
    assert report.common == ["CoNLL2003NER"] and report.rows[0].mean == 90.0


def test_every_figure_is_in_the_page(run: tuple[Path, Results], html: str) -> None:
    _, results = run
    text = Page(html).text
    for model in results.models:
        assert model.name in text and model.revision in text
        for score in model.scores:
            if score.score is not None:
                assert f"{score.score:.2f}" in text and f"{score.score:.1f}" in text
                assert score.interval and f"{score.interval[0]:.1f} to {score.interval[1]:.1f}" in text
            if score.published is not None:
                assert f"{score.published:.2f}" in text
    for needed in (results.provenance.command, "17 min 24 s", "AMD EPYC 7B13", "mteb 2.26.24", "f4cc6c8", "Spearman"):
        assert needed in text
    assert all(digest in text for digest in results.provenance.data.values())


def test_failures_are_shown_with_their_error(html: str, markdown: str) -> None:
    page = Page(html)
    assert page.text.count(FAILURE) >= len(FAILED)
    assert sum(attributes.get("class") == "void" for tag, attributes in page.tags if tag == "line") == len(FAILED)
    assert markdown.count("| failed |") == len(FAILED)
    assert "<b>no vector" not in html and "<b>" not in markdown


def test_the_markdown_tables_are_the_numbers(run: tuple[Path, Results], markdown: str) -> None:
    _, results = run
    for name, row in zip(MODELS, table_rows(markdown, "Quality"), strict=True):
        assert row[:2] == [name, f"{mean_of(results, name):.2f}"]
    for model, row in zip(results.models, table_rows(markdown, "Cost"), strict=True):
        assert row[4] == f"{model.cost.vector_bytes:,}"
    rows = table_rows(markdown, "Retrieval")
    expected = [
        (score.task, f"{score.score:.2f}" if score.score is not None else "failed")
        for task in TASKS
        if task.category == "Retrieval"
        for model in results.models
        for score in model.scores
        if score.task == task.name
    ]
    assert [(row[0], row[3]) for row in rows] == expected
    words = table_rows(markdown, "Word level")
    assert words[-3:] == [
        ["S-LLaMA-1.3B, causal", "86.10", "96.09", "90.89", "–"],
        ["S-LLaMA-1.3B, bidirectional", "76.50", "92.17", "89.18", "–"],
        ["S-LLaMA-1.3B, bidirectional + MNTP", "90.51", "96.59", "92.04", "–"],
    ]
    assert [row[0] for row in words[:-3]] == [SUBJECT, MINILM, MPNET]


def test_the_page_stands_alone_and_is_sound(html: str) -> None:
    page = Page(html)
    assert page.faults == []
    fetching = {"script", "link", "img", "iframe", "object", "embed", "use", "base", "form"}
    assert not {tag for tag, _ in page.tags} & fetching
    assert not any(
        name.startswith("on") or name in ("src", "srcset", "style") for _, fields in page.tags for name in fields
    )
    assert "@import" not in html and "url(" not in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [v for _, fields in page.tags for k, v in fields.items() if k == "aria-labelledby"]
    assert set(labels) <= set(ids)
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) > 15 and all(attributes.get("aria-labelledby") for attributes in charts)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_names_cannot_break_out(run: tuple[Path, Results], tmp_path: Path) -> None:
    evil = '</style><script>alert("1")</script>|`x`_*[a](javascript:b)'
    results = tiny((evil, {evil: 50.0}), ("b" * 300, {evil: None}))
    results.models[0].scores[0].instruction = evil
    results.models[1].scores[0].error = evil
    results.provenance.command = evil
    write_report(tmp_path, results)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and Page(text).faults == []
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in markdown and "](" not in markdown.replace("\\](", "")
    assert all(len(row) == 10 for row in table_rows(markdown, "STS"))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(html: str, scheme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", re.findall(r":root \{(.*?)\}", html, re.DOTALL)[scheme]))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, two: str) -> float:
        dark, light = sorted((luminance(colours[one]), luminance(colours[two])))
        return (light + 0.05) / (dark + 0.05)

    for name in ("ink", "soft", "link", "alarm", "good", "bad"):
        assert contrast(name, "paper") >= 4.5, name
    assert contrast("ink", "alarm-paper") >= 4.5
    for index in range(8):
        assert contrast(f"m{index}", "paper") >= 3, index


def test_bars_and_points_lie_where_the_numbers_are(tmp_path: Path) -> None:
    results = tiny(("slow", {"STS12": 70.0}), ("quick", {"STS12": 60.0}), ("unknown", {"STS12": -5.0}))
    for model, speed in zip(results.models, (10.0, 900.0, None), strict=True):
        model.cost = Cost(texts_per_second=speed, parameters=int(speed * 1e6) if speed else None)
        score = model.scores[0]
        score.interval, score.published = ((score.score or 0) - 2, (score.score or 0) + 3), 64.0
    others = [PublishedModel(f"o/{n}", 10**6 * 3**n, 60.0 + n) for n in range(10)]
    report = build_report_model(
        tmp_path, results, [*others, PublishedModel("o/unsized", None, 70.0), PublishedModel("o/low", 5, -50.0)]
    )
    bars = task_bars(report.groups["STS"][0]).bars
    assert [(bar.end, bar.low, bar.high, bar.published) for bar in bars] == [
        (70.0, 68.0, 73.0, 64.0),
        (60.0, 58.0, 63.0, 64.0),
        (0.0, 0.0, 0.0, 64.0),  # drawn from zero, its figure beside it
    ]
    assert bars[2].text == "−5.0"
    for chart in speed_scatter(report):
        left, top, right, bottom = chart.plot
        slow, quick = sorted(chart.marks, key=lambda mark: mark.index or 0)
        assert left < slow.x < quick.x < right and top < slow.y < quick.y < bottom  # up is less
    wide, narrow = size_scatter(report)
    assert narrow.width < 390 < wide.width
    assert [mark.index for mark in wide.marks] == [*[None] * len(others), 0, 1]  # neither unsized nor hopeless


def test_without_published_scores_nothing_speaks_of_them(tmp_path: Path) -> None:
    write_report(tmp_path, tiny(("a", {"x": 60.0}), ("b", {"x": 50.0})))
    assert "ublished" not in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def browser() -> str:
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if not program:
        pytest.skip("no browser to look at the report with; get one with: apt-get install chromium")
    return program


# Runs in the page: how wide it is, what sticks out of it, and which labels that can be seen lie on each other.
MEASURE = """
const texts = [...document.querySelectorAll("svg text")].filter(e => e.getClientRects().length);
const boxes = texts.map(e => [e.textContent, e.getBoundingClientRect(), e.closest("svg")]);
const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3;
const over = [];
boxes.forEach(([a, p, s], i) => boxes.slice(i + 1).forEach(([b, q, t]) => s === t && meet(p, q) && over.push([a, b])));
const wide = [...document.querySelectorAll("main *, footer *")].filter(
  e => !e.closest(".scroll table, svg") && e.getBoundingClientRect().right > innerWidth + 1);
parent.postMessage(JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth,
  over, wide: wide.map(e => e.outerHTML.slice(0, 80)), labels: texts.length}), "*");
"""
# Browsers refuse windows narrower than 500 pixels; frames may be.
FRAME = """<!doctype html><meta charset="utf-8"><pre></pre>
<script>addEventListener("message", event => document.querySelector("pre").textContent = event.data)</script>
<iframe width="{width}" height="900" style="border: 0" src="page.html"></iframe>"""


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_in_a_real_browser(html: str, width: int, tmp_path: Path) -> None:
    # The page itself allows no script; this copy does, to be measured.
    page = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{MEASURE}</script></body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--hide-scrollbars",
            "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    match = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert match and match[1], done.stderr[-2000:]
    seen = json.loads(unescape(match[1]))
    assert seen["inner"] == width and seen["scroll"] <= width, seen
    assert seen["over"] == [] and seen["wide"] == [], seen
    assert seen["labels"] > 40
