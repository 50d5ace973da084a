"""Collect short English texts from public repositories, for training.

    python tools/repository_texts.py TABLE FOLDER [--mirror MIRROR]

The table names the repositories, each with a commit, its licence, and what is read from which files:
`texts/programming.toml` (software, and what forums discuss) and `texts/news.toml` (headlines and first lines).
Every commit is fetched from GitHub (`git fetch` of one commit) into a folder that is removed at the end, or read from
`--mirror`: bare repositories `OWNER+NAME/repo` or `OWNER/NAME.git`. The same table makes the same file.

Files written:
    FOLDER/texts.tsv.gz    columns text (20 to 240 characters) and origin (owner/name), no text twice
    FOLDER/SOURCES         a line for each repository: name, commit, licence, rows
"""

import argparse
import csv
import fnmatch
import gzip
import hashlib
import html
import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

LARGEST_FILE = 4 << 20  # bytes; a larger file is skipped in a mirror and on GitHub alike
SHORTEST, LONGEST = 20, 240  # characters of a text
WORDS = 3
ASCII = 0.95  # least share of ASCII characters, a guard against other languages
LETTERS = 0.72  # least share of letters and spaces, a guard against code and tables
PLAIN_TYPES = {("builtins", name) for name in ("dict", "list", "str", "int", "tuple", "set")}


@dataclass(frozen=True)
class Part:
    """Files of a repository and the reader of their texts.

    Attributes:
        paths:   shell patterns of paths; `*` matches `/` too
        read:    a key of READERS
        without: patterns of paths that are left out
        options: what the reader needs beside the text
        most:    texts to take, a sample by hashes; None for all
    """

    paths: tuple[str, ...]
    read: str
    without: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    most: int | None = None


@dataclass(frozen=True)
class Source:
    """A repository at a commit, its licence, and the parts that are read."""

    repository: str
    commit: str
    licence: str
    parts: tuple[Part, ...]


class SourcesError(ValueError):
    """Says what is wrong in the table or in a mirror, and what to do."""


def read_table(path: Path) -> list[Source]:
    """Read the sources of a table; raise SourcesError for one without licence, full commit, or known reader."""
    sources = []
    for row in tomllib.loads(path.read_text())["source"]:
        name = row.get("repository", "?")
        if not row.get("licence"):
            raise SourcesError(f"{path.name}: {name} has no licence: name it, or leave the repository out")
        if not re.fullmatch(r"[0-9a-f]{40}", row.get("commit", "")):
            raise SourcesError(f"{path.name}: the commit of {name} is not 40 hex digits: {row.get('commit')!r}")
        parts = []
        for part in row["part"]:
            if part["read"] not in READERS:
                raise SourcesError(f"{path.name}: {name} is read as {part['read']!r}: use one of {sorted(READERS)}")
            options = {key: value for key, value in part.items() if key not in {"paths", "read", "without", "most"}}
            without = tuple(part.get("without", ()))
            parts.append(Part(tuple(part["paths"]), part["read"], without, options, part.get("most")))
        sources.append(Source(name, row["commit"], row["licence"], tuple(parts)))
    return sources


def git_command(folder: Path, *arguments: str) -> list[str]:
    """Return the command that runs git in a bare repository."""
    return ["git", f"--git-dir={folder}", "-c", "safe.bareRepository=all", *arguments]


def run_git(folder: Path, *arguments: str, lines: Iterable[str] = ()) -> bytes:
    """Run git in a bare repository, and return what it prints."""
    return subprocess.run(
        git_command(folder, *arguments), input="\n".join(lines).encode(), capture_output=True, check=True
    ).stdout


def open_repository(source: Source, mirror: Path | None, scratch: Path) -> Path:
    """Return a bare repository that has the commit: of the mirror, or fetched from GitHub into `scratch`."""
    if mirror is None:
        folder = scratch / source.repository.replace("/", "+")
        subprocess.run(["git", "init", "-q", "--bare", str(folder)], check=True)
        address = f"https://github.com/{source.repository}.git"
        run_git(folder, "fetch", "-q", "--depth=1", "--no-tags", address, source.commit)
        return folder
    owner, name = source.repository.split("/")
    for folder in (mirror / f"{owner}+{name}" / "repo", mirror / owner / f"{name}.git"):
        git = folder / ".git" if (folder / ".git").is_dir() else folder
        if git.is_dir():
            return git
    raise SourcesError(
        f"{mirror} has no {owner}+{name}/repo and no {owner}/{name}.git: clone it there, or drop --mirror"
    )


def read_files(folder: Path, commit: str, part: Part) -> Iterator[bytes]:
    """Yield the contents of a part's files at a commit, in order of the hash of their paths.

    Files of LARGEST_FILE bytes and more are left out: a mirror may lack them.
    """
    listing = run_git(folder, "ls-tree", "-r", "-z", commit).decode().split("\0")
    entries = [entry.split("\t", 1) for entry in listing if entry]
    blobs = {path: head.split()[2] for head, path in entries if head.startswith("100") and chooses(part, path)}
    chosen = [blobs[path] for path in sorted(blobs, key=digest)]
    answers = run_git(folder, "cat-file", "--batch-check", lines=chosen).decode().splitlines()
    small = [line.split()[0] for line in answers if line.split()[1] == "blob" and int(line.split()[2]) < LARGEST_FILE]
    with subprocess.Popen(git_command(folder, "cat-file", "--batch"), stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for blob in small:
            process.stdin.write(f"{blob}\n".encode())
            process.stdin.flush()
            size = int(process.stdout.readline().split()[2])
            yield process.stdout.read(size + 1)[:-1]


def digest(text: str) -> bytes:
    """Return the hash by which files and texts are ordered: the same everywhere, and of no other order."""
    return hashlib.sha256(text.encode()).digest()


def chooses(part: Part, path: str) -> bool:
    """Tell whether a part's patterns choose a path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in part.paths) and not any(
        fnmatch.fnmatchcase(path, pattern) for pattern in part.without
    )


def plain(text: str) -> str:
    """Return a piece of Markdown, reStructuredText, AsciiDoc or HTML without its markup, on one line."""
    if re.fullmatch(r"[A-Za-z](?: ?[A-Za-z0-9,.;'\"()/?!+-])*", text):
        return text
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])?", " ", text)  # images and badges
    text = re.sub(r"\[([^\[\]]*)\](\([^()]*(\([^()]*\)[^()]*)*\)|\[[^\]]*\])", r"\1", text)  # links
    text = re.sub(r"(https?|link|xref):[^\s\[\]]+\[([^\[\]]*)\]", r"\2", text)  # links of AsciiDoc
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)\s*(<[^`>]*>)?`", r"\1", text)  # roles of reStructuredText
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"</?[A-Za-z][^<>]*>", " ", text)
    text = html.unescape(text)
    text = re.sub(r":[a-z0-9_+-]{2,}:", " ", text)  # emoji by name
    text = re.sub(r"\\([][*_`#<>|\\.!()-])", r"\1", text)
    text = re.sub(r"(\*\*|__|`+|~~)", "", text)
    text = re.sub(r"(?<![\w*])[*_](?=\S)([^*_]+?)(?<=\S)[*_](?![\w*])", r"\1", text)
    text = re.sub(r"[\u2018\u2019]", "'", re.sub(r"[\u201c\u201d]", '"', text))
    text = re.sub(r"[\u2010-\u2015]", "-", text)
    text = re.sub(r"[^\x20-\x7e\u00a1-\u024f\u0370-\u03ff\u2026]", " ", text)  # emoji, arrows, other scripts
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^((\(?\d+[.)]|\d+ \||Q\d*[.:)]|[-*+>|#:]+)\s+)+", "", text)
    return re.sub(r"\s+([.,;:!?])(?=\s|$)", r"\1", re.sub(r"\s#+$", "", text)).strip(" |*")


def acceptable(text: str) -> bool:
    """Tell whether a plain text is a short English one: its length, words, characters, no address and no code."""
    if not SHORTEST <= len(text) <= LONGEST or len(text.split()) < WORDS:
        return False
    if len(text.encode("ascii", "ignore")) < ASCII * len(text):
        return False
    if len(re.sub(r"[^A-Za-z ]+", "", text)) < LETTERS * len(text):
        return False
    return not re.search(r"https?:|www\.|\S@\S|[{}\\]|\]\(|\$\(|=>|;$|\[!|::\s|[A-Za-z0-9/+]{40}", text)


def sentences(paragraph: str) -> list[str]:
    """Return the sentences of a plain paragraph."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", paragraph)


def shortened(paragraph: str) -> str:
    """Return as many first sentences of a plain paragraph as LONGEST characters hold, at least one."""
    text, *others = sentences(paragraph)
    for sentence in others:
        if len(text) + 1 + len(sentence) > LONGEST:
            break
        text += " " + sentence
    return text


def read_items(content: bytes, _: Mapping[str, Any]) -> Iterator[str]:
    """Yield the items of the lists of a Markdown document, and its table rows' longest cells.

    Counts of stars, formats of books, and what follows a link to the source are left out.
    """
    for line in without_code(content.decode(errors="replace")).splitlines():
        if match := re.match(r"\s*([-*+]|\d+[.)])\s+(\[[ x]\]\s+)?(.*)", line):
            text = re.sub(r"\s*\((HTML|PDF|EPUB|MOBI)[^()]*\)|\s*\[\d* ?\]|\s*\(Source Code\b.*", "", plain(match[3]))
            yield shortened(text)
        elif line.count("|") >= 3:
            yield shortened(max(map(plain, line.split("|")), key=len))


def read_questions(content: bytes, _: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown document that end with a question mark, and its headings."""
    for line in without_code(content.decode(errors="replace")).splitlines():
        text = plain(re.sub(r"^\s*([-*+]|\d+[.)])\s+(\[[ x]\]\s+)?", "", line.strip(" |")))
        if text.endswith("?") or line.lstrip().startswith("#"):
            yield text


def without_code(text: str) -> str:
    """Return a Markdown document without its front matter, fenced blocks and comments."""
    text = re.sub(r"\A\ufeff?---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->|<(pre|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def read_document(content: bytes, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield title, description, headings and first sentences of the paragraphs of a document.

    Read are Markdown with front matter, reStructuredText and AsciiDoc. `paragraphs` (3) is how many paragraphs of a
    document give their first sentence.
    """
    text = content.decode(errors="replace").replace("\r\n", "\n")
    if matter := re.match(r"\ufeff?---\n(.*?)\n---\n", text, flags=re.DOTALL):
        for match in re.finditer(r"^(title|description|summary):\s*(.+)$", matter[1], flags=re.MULTILINE):
            value = re.sub(r"\s+\|\s[^|]*$|^Learn more about:\s", "", match[2].strip().strip("'\""))
            yield shortened(plain(value))
    left = options.get("paragraphs", 3)
    text = re.sub(r"^\[[^\]]*\]$\n?", "", without_code(text), flags=re.MULTILINE)  # attributes of AsciiDoc
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        if not lines:
            continue
        if re.match(r"(#{1,6}|={1,5})\s+\S", lines[0]):
            yield plain(lines[0].lstrip("#= "))
            lines = lines[1:]
        elif len(lines) > 1 and re.fullmatch(r"([=~^*+\"'-])\1{3,}\s*", lines[1]):
            yield plain(lines[0])
            lines = lines[2:]
        lines = list(itertools.takewhile(lambda line: not re.match(r"\s*[-*+] ", line), lines))
        if left and lines and re.match(r"[A-Z*`_\[\"]", lines[0]):
            first = sentences(plain(" ".join(lines)))[0]
            if first.endswith((".", "?", "!")):
                left -= 1
                yield first


def read_matches(content: bytes, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the first group of every match of `pattern`, or with `join`, all groups in that form."""
    text = content.decode(errors="replace").replace("\r\n", "\n")
    form = options.get("join", "{0}")
    for match in re.finditer(options["pattern"], text, flags=re.MULTILINE):
        yield shortened(plain(form.format(*match.groups())))


def read_fields(content: bytes, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts under the keys `fields` at any depth of a JSON document; nothing where it is not JSON."""
    try:
        document = json.loads(content)
    except ValueError:
        return
    stack: list[Any] = [document]
    while stack:
        value: Any = stack.pop()
        if isinstance(value, dict):
            for key in options["fields"]:
                if isinstance(value.get(key), str):
                    yield shortened(plain(value[key]))
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def read_columns(content: bytes, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of columns: `columns` are names of a head line, or, where they are numbers, places."""
    text = content.decode(errors="replace").replace("\r\n", "\n").replace("\0", "")
    separator, names = options.get("separator", ","), options["columns"]
    rows: Iterable[dict[Any, Any]]
    if isinstance(names[0], int):
        rows = (dict(enumerate(line.split(separator))) for line in text.split("\n"))
    else:
        rows = csv.DictReader(io.StringIO(text), delimiter=separator)
    for row in rows:
        for name in names:
            matching = [key for key in row if key == name or fnmatch.fnmatchcase(str(key), str(name))]
            for key in matching:
                yield shortened(plain(row[key] or ""))


class PlainUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, tuples, sets, texts and whole numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a plain type, or raise pickle.UnpicklingError: a pickle can name any code to run."""
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in PLAIN_TYPES:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which is not a plain type")
        return getattr(__import__(module), name)


def read_pickle(content: bytes, _: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that are values of a dict in a pickle of plain types."""
    values = PlainUnpickler(io.BytesIO(content), encoding="latin-1").load().values()
    yield from (shortened(plain(value)) for value in values if isinstance(value, str))


READERS: Mapping[str, Callable[[bytes, Mapping[str, Any]], Iterator[str]]] = {
    "items": read_items,
    "questions": read_questions,
    "document": read_document,
    "matches": read_matches,
    "fields": read_fields,
    "columns": read_columns,
    "pickle": read_pickle,
}


def collect(source: Source, folder: Path, seen: set[str]) -> list[str]:
    """Return the new acceptable texts of a source, and add their keys to `seen`."""
    texts: list[str] = []
    for part in source.parts:
        fresh: dict[str, str] = {}
        for content in read_files(folder, source.commit, part):
            for text in READERS[part.read](content, part.options or {}):
                if acceptable(text) and (key := text.casefold()) not in seen:
                    fresh.setdefault(key, text)
            if part.most is not None and len(fresh) >= 2 * part.most:
                break  # the files come in order of a hash: enough of them are a sample
        keys = list(fresh)
        if part.most is not None and len(keys) > part.most:
            chosen = set(sorted(keys, key=digest)[: part.most])
            keys = [key for key in keys if key in chosen]
        seen.update(keys)
        texts += [fresh[key] for key in keys]
    return texts


def write_texts(sources: list[Source], folder: Path, mirror: Path | None) -> int:
    """Write texts.tsv.gz and SOURCES, each whole or not at all, and return the number of rows."""
    from rich.console import Console
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    lines, table = ["text\torigin"], ["repository\tcommit\tlicence\trows"]
    for source in track(sources, "repositories", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as scratch:
            texts = collect(source, open_repository(source, mirror, Path(scratch)), seen)
        lines += [f"{text}\t{source.repository}" for text in texts]
        table.append(f"{source.repository}\t{source.commit}\t{source.licence}\t{len(texts)}")
    content = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    write_whole(folder / "texts.tsv.gz", content)
    write_whole(folder / "SOURCES", "".join(f"{line}\n" for line in table).encode())
    return len(lines) - 1


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def main() -> int:
    """Run the tool; return 1 where the table or the mirror is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, help="sources to read, such as tools/texts/news.toml")
    parser.add_argument("folder", type=Path, help="where texts.tsv.gz and SOURCES are written")
    parser.add_argument("--mirror", type=Path, help="folder of bare repositories; without it they are fetched")
    arguments = parser.parse_args()
    try:
        rows = write_texts(read_table(arguments.table), arguments.folder, arguments.mirror)
    except SourcesError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{rows:,} texts in {arguments.folder / 'texts.tsv.gz'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
