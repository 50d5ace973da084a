"""`unmask catalogue` as the operator meets it: its output, its exit codes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.accounts import people
from unmask.catalogue.votes import vote
from unmask.storage.database import Database

COMING = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
Ended = subprocess.CompletedProcess[str]
Shell = Callable[..., str]


@pytest.fixture
def shell(unmask: Callable[..., Ended]) -> Shell:
    def run(home: Path, *arguments: str, code: int = 0) -> str:
        done = unmask(*arguments, UNMASK_HOME=str(home))
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


def test_the_steps_of_a_model(shell: Shell, tmp_path: Path, golden_dir: Path) -> None:
    home = tmp_path / "home"
    assert "org/new is requested" in shell(home, "catalogue", "request", "org/new", "--note", "for a friend")
    assert "org/new is coming soon" in shell(home, "catalogue", "announce", "org/new")
    (tmp_path / "new.toml").write_text('id = "org/new"\nname = "The new one"\nlicence = "MIT"\n')
    assert "org/new: 2 fields" in shell(home, "catalogue", "add", str(tmp_path / "new.toml"))
    database = Database(str(home / "accounts" / "accounts.sqlite"))
    with database.begin() as connection:
        account = people.open_account(connection, "somebody", 1)
        vote(connection, account, COMING, "search in letters", 1)
    database.close()
    rows = shell(home, "catalogue", "queue").splitlines()
    assert any(row.split()[:2] == [COMING, "coming"] and "search in letters" in row for row in rows)
    listed = {row.split()[0]: row for row in shell(home, "catalogue", "list").splitlines() if row.strip()}
    assert "coming soon" in listed["org/new"] and "1" in listed[COMING].split()
    # A model may only take the steps that follow, and the message says which do.
    assert "'deprecated' cannot follow 'coming soon'" in shell(
        home, "catalogue", "deprecate", "org/new", "--until", "2100-01-01", code=1
    )
    assert "only a staged model can go live" in shell(home, "catalogue", "live", "org/new", code=1)
    assert "only a deprecation can be taken back" in shell(home, "catalogue", "restore", "org/new", code=1)
    assert "write a day as" in shell(home, "catalogue", "deprecate", "org/new", "--until", "soon", code=1)
    assert "that day is over" in shell(home, "catalogue", "deprecate", "org/new", "--until", "2020-01-01", code=1)
    assert "no record is called" in shell(home, "catalogue", "retire", "org/nothing", code=1)
    assert "no id of a model" in shell(home, "catalogue", "request", "<b>", code=1)
    assert "org/new is retired" in shell(home, "catalogue", "retire", "org/new")
    (tmp_path / "wrong.toml").write_text('id = "org/new"\ncolour = "red"\n')
    assert "unknown field `colour`" in shell(home, "catalogue", "add", str(tmp_path / "wrong.toml"), code=1)
    assert "cannot be read" in shell(home, "catalogue", "add", str(tmp_path / "none.toml"), code=1)


def test_an_onboarding_that_does_not_pass(shell: Shell, tmp_path: Path, golden_dir: Path) -> None:
    home = tmp_path / "home"
    said = shell(home, "onboard", str(golden_dir / "tiny_llama"), code=2)
    assert "not passed" in said and "--licence" in said and "tiny_llama is coming soon." in said
    assert "licence" in shell(home, "catalogue", "gates", "tiny_llama")
    printed = shell(home, "onboard", str(golden_dir / "tiny_llama"), "--json", code=2)
    result, _ = json.JSONDecoder().raw_decode(printed)
    assert (result["model"], result["status"], result["passed"]) == ("tiny_llama", "coming soon", False)
    assert [gate["gate"] for gate in result["gates"]] == ["licence"]
    assert "does not exist" in shell(home, "onboard", COMING, "--weights", str(tmp_path / "nowhere"), code=1)
    assert "no id of a model" in shell(home, "onboard", "nothing at all", code=1)
    assert "choose more than 0" in shell(home, "onboard", str(golden_dir / "tiny_llama"), "--utilisation", "0", code=1)
