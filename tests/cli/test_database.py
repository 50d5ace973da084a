"""Commands on a database that is not there: a mistyped name must not look like an empty database."""

import gzip
import inspect
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cyclopts import App

from unmask.cli import build_app

Command = Callable[..., subprocess.CompletedProcess[str]]

# Command -> words that it needs.
REFUSE = {
    "accounts list": "",
    "accounts freeze": "acct_a",
    "accounts thaw": "acct_a",
    "accounts close": "acct_a",
    "accounts audit": "",
    "accounts backup": "{tmp}/backup.gz",
    "accounts key": "acct_a",
    "accounts keys": "acct_a",
    "accounts rotate": "acct_a key",
    "accounts revoke": "acct_a key",
    "accounts top-up": "acct_a 1 --reference r",
    "accounts pay-out": "acct_a 1 --reference r",
    "accounts refund": "chg_a",
    "accounts statement": "acct_a",
    "accounts prices": "",
    "accounts plan": "small",
    "ledger verify": "",
    "ledger sweep": "",
    "catalogue gates": "unmask/smollm2-embed-6l",
    "catalogue queue": "",
    "catalogue live": "unmask/smollm2-embed-6l",
    "catalogue deprecate": "unmask/smollm2-embed-6l --until 2100-01-01",
    "catalogue restore": "unmask/smollm2-embed-6l",
    "catalogue retire": "unmask/smollm2-embed-6l",
    "providers quarantine": "name model --reason r",
    "providers admit": "name model",
    "providers reload": "--providers {tmp}/providers.toml",
    "providers taint": "",
    "providers history": "",
    "providers bill": "name --month 2026-01",
    "providers pay": "name 1 --reference r",
    "providers margin": "--month 2026-01",
}
# They read the shipped records too, so only a database that is named must be there.
NAMED = {
    "catalogue list": "",
    "providers check": "--providers {tmp}/providers.toml",
    "providers references": "tiny --output {tmp}/out.npz",
}
BEGIN = {
    "accounts create", "accounts price", "accounts restore",
    "catalogue add", "catalogue request", "catalogue announce", "onboard",
}  # fmt: skip


def with_database(app: App, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name in app:
        if not name.startswith("-"):
            target = app[name]
            if target.default_command and "database" in inspect.signature(target.default_command).parameters:
                yield " ".join((*path, name))
            yield from with_database(target, (*path, name))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEY", "sk-a-key")
    (tmp_path / "providers.toml").write_text(
        '[[provider]]\nname = "a"\nkind = "unmask"\nurl = "https://a.example/v1"\nkey_env = "KEY"\n'
        '[[provider.model]]\nid = "tiny"\ncost = "0.004"\n'
    )
    return tmp_path


def test_every_command_with_a_database_is_listed() -> None:
    assert set(with_database(build_app("*"))) == {*REFUSE, *NAMED, *BEGIN}


@pytest.mark.parametrize("command", [*REFUSE, *NAMED])
def test_a_database_that_is_not_there_is_refused(unmask: Command, folder: Path, command: str) -> None:
    missing, home = folder / "typo" / "missing.sqlite", folder / "home"
    words = [*command.split(), *(REFUSE | NAMED)[command].format(tmp=folder).split()]
    done = unmask(*words, "--database", f"sqlite:///{missing}", UNMASK_HOME=str(home))
    assert done.returncode == 1 and done.stderr.startswith(f"unmask: there is no database at {missing}: "), done.stderr
    assert "--database" in done.stderr and "UNMASK_HOME" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["providers.toml"]
    if command in REFUSE:
        done = unmask(*words, UNMASK_HOME=str(home))
        assert done.returncode == 1 and str(home / "accounts" / "accounts.sqlite") in done.stderr
        assert not home.exists()


def test_a_restore_opens_its_file_first(unmask: Command, folder: Path) -> None:
    with gzip.open(folder / "other.gz", "wt") as file:
        file.write('{"rows": 1}\n')
    for name in ("missing.gz", "providers.toml", "other.gz"):
        done = unmask("accounts", "restore", str(folder / name), UNMASK_HOME=str(folder / "home"))
        assert done.returncode == 1 and name in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (folder / "home").exists()


def test_the_shipped_records_need_no_database(unmask: Command, folder: Path) -> None:
    assert "smollm2-embed-6l" in unmask("catalogue", "list", UNMASK_HOME=str(folder / "home")).stdout
