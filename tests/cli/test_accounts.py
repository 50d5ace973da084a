"""`unmask accounts` and `unmask ledger` as the operator meets them: their output, their exit codes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.accounts import people
from unmask.storage.database import Database

Ended = subprocess.CompletedProcess[str]
Shell = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def shell(unmask: Callable[..., Ended], home: Path) -> Shell:
    """Runs commands in a home of the test's own, and gives what they print."""

    def run(*arguments: str, code: int = 0) -> str:
        done = unmask(*arguments, UNMASK_HOME=str(home))
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


def test_an_operators_day(shell: Shell, tmp_path: Path):
    account = shell("accounts", "create", "A machine").strip()
    assert "0.000000001" not in shell("accounts", "list") and account in shell("accounts", "list")
    assert "12.50 dollars" in shell("accounts", "top-up", account, "12.50", "--reference", "invoice 7")
    assert "nothing was added" in shell("accounts", "top-up", account, "12.50", "--reference", "invoice 7")
    assert "stands for 12.50 dollars" in shell("accounts", "top-up", account, "1", "--reference", "invoice 7", code=1)
    key = shell(
        "accounts", "key", account, "--name", "batch job", "--spend-limit", "5", "--spend-window", "day"
    ).strip()
    assert key.startswith("um_") and "\n" not in key
    id = key.split("_")[1]
    listing = shell("accounts", "keys", account)
    assert id in listing and "batch job" in listing and key not in listing
    new = shell("accounts", "rotate", account, id, "--overlap-hours", "0").strip()
    assert new.startswith("um_") and new != key
    assert "is revoked" in shell("accounts", "revoke", account, new.split("_")[1])
    shell("accounts", "price", "some/model", "0.008")
    shell("accounts", "price", "some/model", "0.004", "--tier", "batch")
    assert "0.008" in shell("accounts", "prices") and "0.004" in shell("accounts", "prices")
    shell("accounts", "plan", "small", "--requests-per-minute", "60")
    shell("accounts", "plan", "small", "--account", account)
    assert "small" in shell("accounts", "list")
    assert "is frozen" in shell("accounts", "freeze", account)
    assert "is active" in shell("accounts", "thaw", account)
    assert "10.00 dollars" in shell("accounts", "pay-out", account, "2.5", "--reference", "back 1")
    assert "invoice 7" in shell("accounts", "statement", account)
    assert "drift: none" in shell("ledger", "verify")
    assert "0 holds" in shell("ledger", "sweep")
    shell("accounts", "backup", str(tmp_path / "backup.gz"))
    other = f"sqlite:///{tmp_path / 'other.sqlite'}"
    assert "books balance" in shell("accounts", "restore", str(tmp_path / "backup.gz"), "--database", other)
    assert "10.00" in shell("accounts", "list", "--database", other)
    assert "add --yes" in shell("accounts", "close", account, code=1)
    assert "10.00 dollars were given up" in shell("accounts", "close", account, "--yes")
    log = shell("accounts", "audit")
    for action in ("account.create", "credit.top_up", "key.create", "key.rotate", "price.set", "account.close"):
        assert action in log
    assert key not in log


def test_a_person_is_found_by_address(shell: Shell, tmp_path: Path):
    (tmp_path / "password").write_text("correct horse battery\n")
    arguments = ("--email", "ada@example.org", "--password-file", str(tmp_path / "password"))
    account = shell("accounts", "create", "Ada", *arguments, "--admin").strip()
    assert account in shell("accounts", "top-up", "Ada@example.org", "1", "--reference", "1")
    assert "cannot be used" in shell("accounts", "create", "Ada", *arguments, code=1)


def test_a_byte_order_mark_is_no_part_of_a_password(shell: Shell, home: Path, tmp_path: Path):
    (tmp_path / "password").write_text("correct horse battery\r\n", encoding="utf-8-sig")
    shell("accounts", "create", "Ada", "--email", "ada@example.org", "--password-file", str(tmp_path / "password"))
    database = Database(str(home / "accounts" / "accounts.sqlite"))
    with database.read() as connection:
        stored = people.stored_password(connection, "ada@example.org")
    database.close()
    assert stored is not None and people.check_password(stored[1], "correct horse battery")


def test_a_password_needs_a_terminal_or_a_file(home: Path):
    command = [sys.executable, "-m", "unmask", "accounts", "create", "Ada", "--email", "ada@example.org", "--admin"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120,
        env={**os.environ, "UNMASK_HOME": str(home)}, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "unmask: there is no terminal to ask for the password on; use --password-file\n"
    assert not home.exists()


def test_a_typed_password_is_typed_twice(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    typed: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: typed.pop(0))
    arguments = ("accounts", "create", "Ada", "--email", "ada@example.org")
    typed[:] = ["correct horse battery", "correct horse batter"]
    assert "the two passwords differ" in shell(*arguments, code=1)
    typed[:] = ["correct horse battery", "correct horse battery"]
    assert shell(*arguments).startswith("acct_")
    typed[:] = []  # an address that cannot be used is refused before anything is asked
    assert "cannot be used" in shell(*arguments, code=1)
    assert "no mail address" in shell("accounts", "create", "Ada", "--email", "ada", code=1)


def test_drift_has_an_exit_code_of_its_own(shell: Shell, home: Path):
    account = shell("accounts", "create", "A machine").strip()
    database = Database(str(home / "accounts" / "accounts.sqlite"))
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE accounts SET balance = 5")
    database.close()
    said = shell("ledger", "verify", code=2)
    assert f"{account}: balance: 0.000000005 dollars, but 0.00 by the books" in said and "drift: 1" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["top-up", "acct_none", "1", "--reference", "r"], "no account 'acct_none'"),
        (["top-up", "bob@example.org", "1", "--reference", "r"], "nobody has the address"),
        (["top-up", "acct_none", "1.5x", "--reference", "r"], "no amount of dollars"),
        (["top-up", "acct_none", "0", "--reference", "r"], "more than 0"),
        (["refund", "chg_none"], "chg_none is not known"),
        (["key", "acct_none"], "no account"),
        (["list", "--database", "mysql://x/y"], "'mysql' are not supported"),
        (["restore", "missing.gz"], "missing.gz"),
    ],
)
def test_a_mistake_is_one_line(shell: Shell, arguments: list[str], message: str):
    shell("accounts", "price", "*", "0.008")  # begins the database
    said = shell("accounts", *arguments, code=1)
    assert message in said and len(said.strip().splitlines()) == 1


def test_serve_with_accounts_and_a_key_file(shell: Shell, tmp_path: Path):
    (tmp_path / "keys").write_text("sk-a-key\n")
    said = shell("serve", "--accounts", "--api-key-file", str(tmp_path / "keys"), code=1)
    assert "use one of them" in said


def test_as_processes(home: Path):
    def run(*arguments: str) -> Ended:
        command = [sys.executable, "-m", "unmask", *arguments]
        environment = {**os.environ, "UNMASK_HOME": str(home), "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)

    made = run("accounts", "create", "A machine")
    assert (made.returncode, made.stderr) == (0, "") and made.stdout.startswith("acct_")
    listed = run("accounts", "list")
    assert listed.returncode == 0 and made.stdout.strip() in listed.stdout and "A machine" in listed.stdout
    refusal = run("accounts", "top-up", "acct_none", "1", "--reference", "r")
    assert (refusal.returncode, refusal.stdout) == (1, "") and refusal.stderr.startswith("unmask: there is no account")
