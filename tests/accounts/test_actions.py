"""Every change that must be audited is made through an action, which appends its audit row."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unmask
from unmask.accounts import actions, audit, keys, people
from unmask.accounts.audit import COMMAND_LINE, Actor
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.tariff import RatePlan, TariffPrice
from unmask.errors import LedgerRefused
from unmask.storage.database import Database

PACKAGE = Path(unmask.__file__).parent
NOW = 1_700_000_000_000

# Functions that change tables without an audit row, by the module that defines them. Only actions call them.
UNAUDITED = {
    "unmask.accounts.people": {
        "open_account", "set_frozen", "close_account", "sign_up", "add_identity", "remove_identity", "set_password",
        "create_session", "accept_invitation",  # not delete_session, which a second sign-in does silently
    },
    "unmask.accounts.keys": {"create", "change", "rotate", "revoke"},
    "unmask.accounts.ledger": {"top_up", "refund", "pay_out"},
    "unmask.accounts.tariff": {"set_price", "remove_price", "set_plan", "assign_plan"},
    "unmask.catalogue.store": {"put_fields", "step"},
}  # fmt: skip


def calls(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, function) for every call in a file of a function imported from `unmask`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}
    functions: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unmask"):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                functions[alias.asname or alias.name] = (node.module, alias.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            yield modules.get(node.func.value.id, ""), node.func.attr
        elif isinstance(node.func, ast.Name) and node.func.id in functions:
            yield functions[node.func.id]


def files(*packages: str) -> Iterator[Path]:
    """Yield the modules of the named packages."""
    for package in packages:
        yield from (PACKAGE / package).rglob("*.py")


def test_only_accounts_append_to_the_audit_log() -> None:
    others = [file for file in PACKAGE.rglob("*.py") if "accounts" not in file.relative_to(PACKAGE).parts[:1]]
    assert len(others) > 100
    appends = {file: name for file in others for module, name in calls(file) if module == "unmask.accounts.audit"
               and name.startswith("append")}  # fmt: skip
    # Packages above accounts append by functions of the log that name the subject of the change.
    own = {"catalogue": "append_model_", "onboarding": "append_model_", "router": "append_provider_verdict"}
    foreign = {file: name for file, name in appends.items() if not name.startswith(own.get(file.parent.name, "never"))}
    assert foreign == {}, "make the change through unmask.accounts.actions or unmask.catalogue.actions"
    assert {file.parent.name for file in appends} >= {"catalogue", "router"}


def test_pages_api_and_commands_change_nothing_without_an_audit_row() -> None:
    packages = [name for name in ("router", "api", "web", "server", "cli") if (PACKAGE / name).is_dir()]
    assert {"web", "cli"} <= set(packages)
    unaudited = [
        f"{file.relative_to(PACKAGE)}: {module}.{name}"
        for file in files(*packages)
        for module, name in calls(file)
        if name in UNAUDITED.get(module, ())
    ]
    assert unaudited == []


def test_the_lists_above_name_functions_that_exist() -> None:
    for module, names in UNAUDITED.items():
        source = (PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert names <= defined


def test_each_action_appends_its_row(database: Database, peppers: Peppers) -> None:
    ada = Actor("person_ada", "203.0.113.7")
    with database.begin() as connection:
        account = actions.create_account(connection, COMMAND_LINE, peppers, "Ada", NOW)
        key = keys.key_id(actions.create_key(connection, ada, peppers, account, KeySettings(), NOW))
        actions.change_key(connection, ada, account, key, KeySettings(name="new"), NOW)
        other = keys.key_id(actions.rotate_key(connection, ada, peppers, account, key, NOW, overlap_ms=1))
        assert actions.revoke_key(connection, ada, account, key, NOW)
        assert actions.top_up(connection, ada, account, 50, "invoice 1", NOW)
        actions.pay_out(connection, ada, account, 20, "transfer 1", NOW)
        actions.set_price(connection, ada, TariffPrice("m", "default", 5), NOW)
        assert actions.remove_price(connection, ada, "m", "default", NOW)
        actions.set_proposed_price(connection, ada, "m", 7, NOW)
        actions.set_plan(connection, ada, RatePlan("small", 5, None), NOW)
        actions.assign_plan(connection, ada, account, "small", NOW)
        assert actions.set_account_frozen(connection, ada, account, NOW, frozen=True)
        assert actions.close_account(connection, ada, account, NOW) == 30
    with database.read() as connection:
        rows = [event for _, event in reversed(audit.events(connection))]
    assert [(row.action, row.subject, row.detail) for row in rows] == [
        ("account.create", account, {"admin": False, "plan": "default"}),
        ("key.create", account, {"key": key}),
        ("key.change", account, {"key": key}),
        ("key.rotate", account, {"key": key, "by": other}),
        ("key.revoke", account, {"key": key}),
        ("credit.top_up", account, {"nano": 50, "reference": "invoice 1", "gift": False}),
        ("credit.pay_out", account, {"nano": 20, "reference": "transfer 1"}),
        ("price.set", "m", {"tier": "default", "nano_per_million": 5}),
        ("price.remove", "m", {"tier": "default"}),
        ("price.set", "m", {"nano_per_million": 7}),
        ("plan.set", "small", {"limits": {"requests_per_minute": 5, "tokens_per_minute": None}}),
        ("plan.assign", account, {"plan": "small"}),
        ("account.freeze", account, {}),
        ("account.close", account, {"given_up_nano": 30}),
    ]
    assert (rows[0].actor, rows[0].address) == ("command line", "")
    assert {(row.actor, row.address) for row in rows[1:-1]} == {("person_ada", "203.0.113.7")}
    assert (rows[-1].actor, rows[-1].address) == ("person_ada", "")


def test_an_action_that_changes_nothing_appends_nothing(database: Database, peppers: Peppers) -> None:
    with database.begin() as connection:
        account = people.open_account(connection, "Ada", NOW)
        key = keys.key_id(keys.create(connection, peppers, account, KeySettings(), NOW))
        keys.revoke(connection, account, key, NOW)
        assert not actions.revoke_key(connection, COMMAND_LINE, account, key, NOW)
        assert not actions.set_account_frozen(connection, COMMAND_LINE, account, NOW, frozen=False)
        assert not actions.remove_price(connection, COMMAND_LINE, "m", "default", NOW)
        assert audit.events(connection) == []


def test_the_audit_row_of_a_refund_is_about_the_account_where_one_is_named(database: Database) -> None:
    with database.begin() as connection:
        account = people.open_account(connection, "Ada", NOW)
        with pytest.raises(LedgerRefused, match="there is no charge 'chg_1' of this account"):
            actions.refund(connection, COMMAND_LINE, "chg_1", NOW, account=account)
        with pytest.raises(LedgerRefused, match="charge chg_1 is not known"):
            actions.refund(connection, COMMAND_LINE, "chg_1", NOW)
