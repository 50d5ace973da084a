"""The pages: links resolve, named files exist, snippets run, and no page prints an install command that fails."""

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unmask import Encoder
from unmask.checkpoint.adapter_config import LORA_FIELDS
from unmask.checkpoint.packaged_models import PACKAGED_MODELS
from unmask.checkpoint.shipped import DEFAULT_MODEL, SHIPPED
from unmask.encoder.model.architectures import ROPE_TYPES

ROOT = Path(__file__).parent.parent
# Reports are generated, and the changelog names files as they were called at the time.
GENERATED = ("docs/evaluation/", "docs/ablation/", "docs/performance/", "tests/")


def tracked(*patterns: str) -> list[str]:
    """Paths of the files that git knows or would take up."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if (ROOT / line).exists()]


PAGES = [ROOT / path for path in tracked("*.md") if not path.startswith(GENERATED)]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:unmask|tests|docs|recipes|benchmarks|examples)/[\w./-]+)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_named_files_exist(page: Path):
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        if path not in SHIPPED and not re.search(r"\b[xy]\b", path):
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_the_table_of_adapter_fields_is_that_of_the_code():
    rows = [f"| `{field}` | {treatment} | {meaning} |" for field, (treatment, meaning) in LORA_FIELDS.items()]
    assert "\n".join(["|---|---|---|", *rows, ""]) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_table_of_rope_types_has_those_of_the_code():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page[page.index("| `rope_type` |") :].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(ROPE_TYPES)


def test_the_readme_begins_with_everything_needed_for_a_start():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = readme.split("\n## Features")[0]
    assert len(screen.splitlines()) <= 60
    for part in ("make serve", ".venv/bin/python", "Encoder.load", "curl ", "](docs/performance/", "docs/index.md"):
        assert part in screen


@pytest.mark.slow
def test_figures_in_the_pages_are_those_of_the_committed_evaluation():
    """`python docs/figures.py` mends them."""
    module = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for page in module["PAGES"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "<!-- figures: " in text and module["fill"](text) == text, page


@pytest.mark.weights
def test_the_code_of_the_readme_runs():
    code = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code[0], names)
    encoder, queries, passages = names["encoder"], names["queries"], names["passages"]
    assert isinstance(encoder, Encoder)
    scores = encoder.similarity(queries, passages)
    assert scores[0, 0] > scores[0, 1]


def test_every_model_that_a_page_fetches_is_there():
    names = {
        (file, name)
        for file in tracked("*.md", "recipes", "examples", "benchmarks")
        for name in re.findall(r"unmask models fetch ([\w.-]+)", (ROOT / file).read_text(errors="ignore"))
    }
    assert len(names) > 3 and {pair for pair in names if pair[1] not in PACKAGED_MODELS} == set()


def test_no_text_names_an_install_command_of_the_index():
    """The package is on no index: `pip install unmask` would fail, or install a stranger's package."""
    for file in tracked("*.md", "docs", "examples", "unmask"):
        text = (ROOT / file).read_bytes().decode("utf-8", errors="ignore")
        assert not re.search(r"pip install ['\"]?unmask(?![\w-]*[/.*])", text), file


def test_names_do_not_differ_only_in_case():
    """Such names collide on macOS and Windows."""
    lower: dict[str, str] = {}
    for file in tracked():
        for parent in [Path(file), *Path(file).parents]:
            assert lower.setdefault(str(parent).lower(), str(parent)) == str(parent)


def test_pictures_stay_small():
    """The pictures of the docs are at most 3 MB together."""
    pictures = [file for file in (ROOT / "docs").rglob("*") if file.suffix in (".png", ".webp", ".svg", ".jpg")]
    assert sum(file.stat().st_size for file in pictures) < 3_000_000


def test_the_pages_name_models_that_ship_and_the_readme_the_default_one():
    names = {
        file: set(re.findall(r"\bunmask/smollm2[\w-]*", (ROOT / file).read_text(encoding="utf-8")))
        for file in tracked("README.md", "docs/*.md", "examples/*", ".github/*.yml")
        if not file.startswith(GENERATED)
    }
    assert {name for page_names in names.values() for name in page_names} <= set(SHIPPED)
    assert names["README.md"] == {DEFAULT_MODEL}
