"""`tools/repository_texts.py` on a small repository made here: read from a mirror, and fetched over git."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from repository_texts import SourcesError, acceptable, plain, read_table

TOOL = Path(__file__).parents[2] / "tools" / "repository_texts.py"
TABLES = TOOL.with_name("texts")
FILES: Mapping[str, bytes] = {
    "README.md": b"""# Birds of the terminal
* [canary](https://canary.example/x_(y)) - Sings a *song* when a `pipe` breaks. ![badge](https://b.example/i.svg)
* short one
1. **Wren** - A small shell for [small machines](docs/small.md)! (Source Code) MIT C
- A bare address such as https://wren.example is left out
```
* not an item of the list but code
```
| name | what |
|---|---|
| finch | Draws trees of folders in a terminal |
""",
    "docs/guide.md": b"""---
title: 'Install the shell of birds | Birds and Shells'
---
## Before you begin with wrens

The shell needs a terminal. It also needs patience.

- What is in a list is no paragraph.

Is there a second paragraph? There is.
""",
    "docs/nest.rst": b"Nests of processes\n==================\n\n[float]\nA :term:`nest <nest>` has ``many`` eggs.\n",
    "docs/de/guide.md": b"# Die Shell installieren und benutzen\n",
    "questions.md": b"### 1. What is a canary release?\n\nA release.\n\n* [ ] Why do wrens fork so often?\n",
    "packages/a.json": json.dumps({"info": {"description": "Parses seeds &amp; grains quickly"}}).encode(),
    "packages/b.json": b'{"description": "half a document',
    "titles.tsv": b"1\tHow to sort a list of birds?\n2\tHOW TO SORT A LIST OF BIRDS?\n3\tWhy does my nest leak?\n",
    "talk.csv": b'Answer.sentence1,Answer.sentence2,else\n"I like sparrows, do you?",Not so much as owls.,no answer\n',
    "titles.pickle": pickle.dumps({7: "Join two tables of nests in SQL", 8: ("a", "tuple")}),
    "large.tsv": b"1\tThis line is in a file that is too large\n" + b"-" * (4 << 20),
    "notes.txt": b"".join(b"note: number %d of the many notes here\n" % number for number in range(50)),
}
TABLE = """
[[source]]
repository = "birds/shell"
commit = "{commit}"
licence = "CC0-1.0"
part = [
    {{ paths = ["README.md"], read = "items" }},
    {{ paths = ["docs/*"], read = "document", without = ["docs/de/*"] }},
    {{ paths = ["questions.md"], read = "questions" }},
    {{ paths = ["packages/*.json"], read = "fields", fields = ["description"] }},
    {{ paths = ["titles.tsv", "large.tsv"], read = "columns", columns = [1], separator = "\\t" }},
    {{ paths = ["talk.csv"], read = "columns", columns = ["Answer.sentence*"] }},
    {{ paths = ["titles.pickle"], read = "pickle" }},
    {{ paths = ["notes.txt"], read = "matches", pattern = '^(\\w+): (.+)$', join = "{{1}} ({{0}})", most = 3 }},
]
"""
TEXTS = {
    "canary - Sings a song when a pipe breaks.",
    "Wren - A small shell for small machines!",
    "Draws trees of folders in a terminal",
    "Install the shell of birds",
    "Before you begin with wrens",
    "The shell needs a terminal.",
    "Is there a second paragraph?",
    "A nest has many eggs.",
    "What is a canary release?",
    "Why do wrens fork so often?",
    "Parses seeds & grains quickly",
    "How to sort a list of birds?",
    "Why does my nest leak?",
    "I like sparrows, do you?",
    "Not so much as owls.",
    "Join two tables of nests in SQL",
}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def make_repository(mirror: Path, files: Mapping[str, bytes] = FILES) -> str:
    """Make MIRROR/birds/shell.git with a commit of the files, and return the commit."""
    work = mirror / "work"
    for path, content in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content)
    git(work, "init", "-q")
    git(work, "add", ".")
    git(work, "commit", "-q", "-m", "birds")
    git(mirror, "clone", "-q", "--bare", "work", "birds/shell.git")
    return git(work, "rev-parse", "HEAD")


def run_tool(folder: Path, table: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(table), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def read_rows(folder: Path) -> list[tuple[str, str]]:
    head, *lines = gzip.decompress((folder / "texts.tsv.gz").read_bytes()).decode().splitlines()
    assert head == "text\torigin"
    return [(text, origin) for text, origin in (line.split("\t") for line in lines)]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bare repository and a table that pins its commit."""
    folder = tmp_path_factory.mktemp("mirror")
    (folder / "table.toml").write_text(TABLE.format(commit=make_repository(folder)))
    return folder


@pytest.fixture(scope="module")
def collected(mirror: Path) -> Path:
    """The folder that the tool has written from the mirror."""
    run = run_tool(mirror / "out", mirror / "table.toml", "--mirror", str(mirror))
    assert run.returncode == 0, run.stderr
    return mirror / "out"


def test_every_reader_gives_its_texts_without_markup(collected: Path) -> None:
    rows = read_rows(collected)
    assert {origin for _, origin in rows} == {"birds/shell"}
    notes = {text for text, _ in rows if text.endswith("(note)")}
    assert {text for text, _ in rows} - notes == TEXTS
    assert len(notes) == 3
    assert len(rows) == len(TEXTS) + 3


def test_sources_name_the_commit_the_licence_and_the_rows(collected: Path, mirror: Path) -> None:
    commit = git(mirror / "work", "rev-parse", "HEAD")
    head, line = (collected / "SOURCES").read_text().splitlines()
    assert head.split("\t") == ["repository", "commit", "licence", "rows"]
    assert line.split("\t") == ["birds/shell", commit, "CC0-1.0", str(len(TEXTS) + 3)]


def test_a_fetched_commit_gives_the_same_bytes_as_a_mirror(collected: Path, mirror: Path, tmp_path: Path) -> None:
    here = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{mirror}/.insteadOf"}
    run = run_tool(tmp_path, mirror / "table.toml", **here, GIT_CONFIG_VALUE_0="https://github.com/")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "texts.tsv.gz").read_bytes() == (collected / "texts.tsv.gz").read_bytes()


def test_a_pickle_that_names_code_is_refused(tmp_path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "harm").encode() + b"'\ntR."
    commit = make_repository(tmp_path, {"titles.pickle": evil})
    part = '[[source]]\nrepository = "birds/shell"\nlicence = "MIT"\npart = [{ paths = ["*"], read = "pickle" }]\n'
    (tmp_path / "table.toml").write_text(f'{part}commit = "{commit}"\n')
    run = run_tool(tmp_path / "out", tmp_path / "table.toml", "--mirror", str(tmp_path))
    assert run.returncode != 0
    assert "os.system, which is not a plain type" in run.stderr
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out" / "texts.tsv.gz").exists()


def test_a_repository_that_the_mirror_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text(TABLE.format(commit="0" * 40))
    run = run_tool(tmp_path / "out", tmp_path / "table.toml", "--mirror", str(tmp_path))
    assert run.returncode == 1
    assert "no birds+shell/repo and no birds/shell.git" in run.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('licence = "CC0-1.0"', "", "birds/shell has no licence"),
        ('commit = "{commit}"', 'commit = "main"', "not 40 hex digits: 'main'"),
        ('read = "items"', 'read = "magic"', "read as 'magic'"),
    ],
)
def test_a_wrong_table_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "table.toml"
    path.write_text(TABLE.replace(old, new).format(commit="0" * 40))
    with pytest.raises(SourcesError, match=message):
        read_table(path)


@pytest.mark.parametrize(("table", "least"), [("programming", 100), ("news", 3)])
def test_no_licence_of_a_table_forbids_a_model_that_ships(table: str, least: int) -> None:
    sources = read_table(TABLES / f"{table}.toml")
    assert len({source.repository for source in sources}) == len(sources) >= least
    assert not [source.repository for source in sources if {"NC", "ND", "GPL"} & set(source.licence.split("-"))]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("## 3. Bird names in C# ##", "Bird names in C#"),
        ("> Q3. Use :code:`let` & [var][1] :rocket:", "Use let & var"),
        ("See link:guide.html[the guide] of <b>nests</b>", "See the guide of nests"),
        ("`nest <https://nest.example>`_ \u2013 it\u2019s a_snake_case name", "nest - it's a_snake_case name"),
    ],
)
def test_markup_of_several_kinds_is_removed(markup: str, text: str) -> None:
    assert plain(markup) == text


@pytest.mark.parametrize(
    "text",
    [
        "two-words-in-a long-row",
        "short is short",
        "x" * 30 + " is followed by " + "y" * 200,
        "für Vögel größer als Möwen",
        "for (i = 0; i < 10; i++) sum += i;",
        "write to somebody@example.org about it",
    ],
)
def test_what_is_no_short_english_text_is_left_out(text: str) -> None:
    assert not acceptable(text)
