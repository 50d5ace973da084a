"""Hooks of the documentation build: generate pages from the code, and take in files from outside docs/."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages of the site, too.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
} | {
    card.relative_to(ROOT).as_posix(): f"model-cards/{card.parent.name}.md"
    for card in sorted(ROOT.glob("unmask/checkpoint/*/*/README.md"))
}
CLI_MARK = "<!-- generated from unmask.cli -->"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in the command-line reference, and turn links that leave docs/ into pages of the site or plain text."""
    if CLI_MARK in markdown:
        from unmask.cli import build_app

        pages = build_app("*").generate_docs(output_format="markdown", include_hidden=False)
        markdown = markdown.replace(CLI_MARK, pages.partition("\n")[2])
    return _LINK.sub(lambda link: _inside(link, page.file.src_uri), markdown)


def _inside(link: re.Match[str], page: str) -> str:
    """Rewrite a link for the site. `page` is the path of the linking page below docs/."""
    text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link.group()
    source = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}.get(page, f"docs/{page}")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if file in PAGES:
        target = PAGES[file]
    elif file.startswith("docs/"):
        target = file.removeprefix("docs/")
    else:
        return text  # a file of the repository that is no page
    return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{hash_}{anchor})"
