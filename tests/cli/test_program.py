"""The table of commands, the pages of `--help`, and the output of commands at 60, 80 and 120 columns."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from cyclopts import App

from unmask.cli.program import COMMANDS, build_app

Ended = subprocess.CompletedProcess[str]
Command = Callable[..., Ended]
WIDTHS = (60, 80, 120)
# Packages that take long to import. A page of help needs none of them.
HEAVY = {
    *("torch", "transformers", "numpy", "tokenizers", "safetensors", "pyarrow", "scipy", "sklearn", "pandas"),
    *("datasets", "mteb", "matplotlib", "starlette", "uvicorn", "huggingface_hub", "alembic", "jinja2", "httpx"),
}
# Commands of which nearly every subcommand opens the database.
WITH_DATABASE = {"accounts", "ledger", "catalogue"}
# Signs of boxes, cut words and terminals.
NOT_PLAIN = re.compile("[\u2500-\u257f\x1b…]")


def _subcommands(app: App, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name in app:
        if not name.startswith("-"):
            yield from _subcommands(app[name], (*path, name))


@cache
def commands() -> list[tuple[str, ...]]:
    return list(_subcommands(build_app("*")))


def words(text: str) -> set[str]:
    return set(text.split())


@pytest.fixture
def home(unmask: Command, tmp_path: Path) -> Path:
    """A home with accounts, keys, entries, prices and votes to list."""
    home = tmp_path / "home"

    def run(*arguments: str) -> str:
        done = unmask(*arguments, UNMASK_HOME=str(home))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    account = run("accounts", "create", "The machine of the department of linguistics")
    run("accounts", "top-up", account, "12.50", "--reference", "invoice 2026-0017", "--note", "paid by bank transfer")
    run("accounts", "key", account, "--name", "nightly batch job", "--spend-limit", "5")
    run("accounts", "price", "*", "0.008")
    run("catalogue", "request", "organisation/a-model-with-a-long-name", "--note", "for search in old letters")
    return home


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_table_has_the_summary_of_each_command(command) -> None:
    assert build_app(command.name)[command.name].help.splitlines()[0].startswith(command.summary)


def test_help_groups_the_commands(unmask: Command) -> None:
    lines = unmask("--help").stdout.splitlines()
    headings = [line for line in lines if re.fullmatch(r"\S.*:", line)]
    assert headings == ["Start here:", "Train an encoder:", "Measure and compare:", "Operate a server:", "Options:"]
    assert lines[lines.index("Start here:") + 1].split()[0] == "encode"


def modules_after(*command_lines: tuple[str, ...]) -> list[set[str]]:
    """Run command lines one after the other in a process. Returns the modules it has imported after each."""
    code = (
        "import sys; from unmask.cli import main\n"
        f"for line in {command_lines}:\n"
        "    try: main(line)\n"
        "    except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stderr.splitlines()]


def test_help_imports_no_package_of_ours_but_cli() -> None:
    ours = {name for name in modules_after(("--help",))[0] if name.startswith("unmask.")}
    modules = ("cli", "cli.help", "cli.program", "cli.version", "terminal", "errors")
    assert ours == {f"unmask.{name}" for name in modules}


def test_the_help_of_a_command_imports_nothing_heavy() -> None:
    names = sorted((command.name for command in COMMANDS), key=lambda name: name in WITH_DATABASE)
    for name, modules in zip(names, modules_after(*((name, "--help") for name in names)), strict=True):
        heavy = HEAVY if name in WITH_DATABASE else HEAVY | {"sqlalchemy", "msgspec"}
        assert not heavy & modules, name


def test_help_pages_fit_and_cut_no_word(unmask: Command) -> None:
    for path in commands():
        whole = words(unmask(*path, "--help", COLUMNS="1000").stdout)
        for width in WIDTHS:
            page = unmask(*path, "--help", COLUMNS=str(width)).stdout
            assert not NOT_PLAIN.search(page), (path, width)
            assert max(map(len, page.splitlines())) <= width, (path, width)
            assert words(page) == whole, (path, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        "models",
        "models fetch",
        "accounts list",
        "accounts keys ACCOUNT",
        "accounts statement ACCOUNT",
        "accounts prices",
        "accounts audit",
        "catalogue list",
        "catalogue queue",
        "ledger verify",
    ],
)
def test_lists_cut_no_word_and_come_as_json(unmask: Command, home: Path, width: int, arguments: str) -> None:
    account = json.loads(unmask("accounts", "list", "--json", UNMASK_HOME=str(home)).stdout)[0]["account"]
    line = arguments.replace("ACCOUNT", account).split()
    printed = unmask(*line, UNMASK_HOME=str(home), COLUMNS=str(width)).stdout
    assert not NOT_PLAIN.search(printed)
    whole = unmask(*line, UNMASK_HOME=str(home), COLUMNS="1000").stdout
    assert words("\n".join(whole.splitlines()[1:] or whole.splitlines())) <= words(printed)
    assert len(printed) < 200 or max(len(part.strip()) for part in printed.splitlines()) > 20  # no one-letter column
    for text in printed.splitlines():
        assert len(text) <= width or len(text.split()) == 1  # a single word may be longer than the terminal
    assert isinstance(json.loads(unmask(*line, "--json", UNMASK_HOME=str(home)).stdout), list | dict)


def test_the_wording_of_a_mistake_has_no_box(unmask: Command) -> None:
    done = unmask("encode", "in.txt", "--output", "x.npy", "--no-such-option")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("unmask: ") and len(done.stderr.splitlines()) == 1


def test_an_unknown_option_is_no_input(unmask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = unmask("encode", "in.txt", "-o", "y.npy", "--dimension", "3")
    assert (done.returncode, done.stderr) == (1, "unmask: Unknown option: --dimension. Did you mean --dimensions?\n")
    assert "cannot read -x.txt" in unmask("encode", "-o", "y.npy", "--", "-x.txt").stderr
    assert "standard input" in unmask("encode", "-o", "y.npy", "-", "--", "-x.txt").stderr


def test_device_options_say_that_cuda_is_untested(unmask: Command) -> None:
    for path in commands():
        page = " ".join(unmask(*path, "--help").stdout.split())
        assert "--device" not in page or "has not been run on a GPU yet" in page, path


def test_no_command_has_many_parameters() -> None:
    app = build_app("*")
    for path in commands():
        target = app
        for name in path:
            target = target[name]
        if target.default_command is not None and path:
            assert len(inspect.signature(target.default_command).parameters) <= 12, path
