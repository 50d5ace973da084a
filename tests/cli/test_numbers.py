"""Every number that can be typed has a smallest one, and a smaller one is refused with the option's name.

The options are those that the command line has, so that a new one fails here until it is listed.
"""

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError

from tests.training.tiny import GOLDEN, write_pairs
from unmask.accounts import Accounts, keys, people
from unmask.accounts.keys import KeySettings
from unmask.accounts.tariff import RatePlan, set_plan
from unmask.api.settings import ServeSettings
from unmask.cli import build_app
from unmask.encoder import Encoder
from unmask.errors import UnmaskError, UsageError
from unmask.evaluate.models import open_model
from unmask.web.forms import parse_amount, parse_whole_number

TINY = str(GOLDEN / "tiny_llama")
COUNT = ("0", "-1", "0.4", "1.5", "2.0", "1e3", "nan", "inf", "")
POSITIVE = ("0", "-1", "nan", "inf", "")
SHARE = ("-0.1", "1.1", "nan", "inf", "")
SIZE = ("-1", "nan", "inf", "")
AMOUNT = ("-1", "nan", "inf", "1e3", "1,000", "0.0000000001", "٣", "")
WORKERS = {"--worker-cpus": SIZE, "--worker-gpus": SIZE, "--worker-wait": POSITIVE}
# Command -> the arguments that it needs besides, and option -> numbers that it refuses.
NUMBERS: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {
    "encode": (
        ["{tmp}/a.txt", "-o", "{tmp}/a.npy", "--model", TINY],
        {"--dimensions": (*COUNT, "65"), "--max-length": COUNT, "--price-per-hour": ("0", *AMOUNT), **WORKERS},
    ),
    "train": (["{tmp}/r.toml", "-o", "{tmp}/run"], WORKERS),
    "cluster check": (["127.0.0.1:1"], {"--wait": POSITIVE, "--max-length": COUNT}),
    "export": ([TINY, "--to", "hub", "-o", "{tmp}/exported"], {"--dimensions": (*COUNT, "65")}),
    "parity": ([TINY, TINY], {"--dimensions": (*COUNT, "65")}),
    "serve": (
        ["--model", TINY],
        {
            "--port": ("-1", "65536", "8000.5", "nan"),
            "--free-credit": AMOUNT,
            "--body-limit-mb": (*POSITIVE, "x"),
            "--request-timeout": POSITIVE,
            "--stop-delay": SIZE,
            "--queue-tokens": COUNT,
            "--cache-mb": ("-1", "nan", "inf", "x"),
            "--replica-cpus": POSITIVE,
            "--replica-gpus": SIZE,
        },
    ),
    "probe-layers": (["{tmp}/r.toml", "-o", "{tmp}/probe"], {"--texts": COUNT, "--held-out": (*COUNT, "4500")}),
    "mine": (
        ["{tmp}/pairs.tsv", "-o", "{tmp}/mined.jsonl", "--model", TINY],
        {
            "--count": COUNT,
            "--skip": ("-1", "0.5", "nan"),
            "--max-share": ("0", "-1", "1.1", "nan"),
            "--margin": ("-0.1", "2", "nan", "inf"),
            "--max-bad-rows": SHARE,
        },
    ),
    "merge linear": ([TINY, TINY, "-o", "{tmp}/merged"], {"--weight": SHARE}),
    "merge slerp": ([TINY, TINY, "-o", "{tmp}/merged"], {"--weight": SHARE}),
    "merge average": ([TINY, TINY, "-o", "{tmp}/merged"], {"--rank": COUNT}),
    "merge stack": ([TINY, TINY, "-o", "{tmp}/merged"], {"--rank": COUNT}),
    "accounts audit": ([], {"--lines": COUNT}),
    "accounts statement": (["{account}"], {"--lines": COUNT}),
    "accounts key": (
        ["{account}"],
        {"--requests-per-minute": COUNT, "--tokens-per-minute": COUNT, "--days": (*POSITIVE, "0.5", "1e300")},
    ),
    "accounts rotate": (["{account}", "{key}"], {"--overlap-hours": ("-1", "nan", "inf", "1e300", "")}),
    "accounts plan": (["small"], {"--requests-per-minute": COUNT, "--tokens-per-minute": COUNT}),
    "providers taint": ([], {"--days": COUNT}),
    "onboard": (
        [TINY],
        {
            "--length": COUNT,
            "--callers": COUNT,
            "--seconds": POSITIVE,
            "--utilisation": (*POSITIVE, "1.1"),
            "--cost-per-hour": AMOUNT,
            "--price": AMOUNT,
        },
    ),
}
CASES = [(command, option, value) for command, (_, own) in NUMBERS.items() for option in own for value in own[option]]


def number_options(app: App, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield `command --option` for every option with a number, of all commands."""
    for name in app:
        if not name.startswith("-"):
            yield from number_options(app[name], (*path, name))
    if app.default_command is None:
        return
    for argument in app.assemble_argument_collection():
        kinds = {argument.hint, *typing.get_args(argument.hint)}
        if kinds & {int, float} and argument.parse:
            yield " ".join((*path, argument.names[0]))


def test_every_option_with_a_number_is_listed() -> None:
    listed = {f"{command} {option}" for command, (_, options) in NUMBERS.items() for option in options}
    assert set(number_options(build_app("*"))) == listed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a file for each command, and an account with a key in a home of its own."""
    folder = write_pairs(tmp_path_factory.mktemp("numbers"))
    (folder / "a.txt").write_text("a text\n")
    recipe = f'base = "{TINY}"\nobjective = "supervised"\nsteps = 1\ndistillation = {{ teacher = "{TINY}" }}\n'
    data = '[[data]]\nname = "d"\npath = "pairs.tsv"\nquery = "query"\npositive = "positive"\n'
    (folder / "r.toml").write_text(recipe + data)
    accounts = Accounts(f"sqlite:///{folder / 'accounts' / 'accounts.sqlite'}", pepper=folder / "accounts" / "pepper")
    with accounts.database.begin() as connection:
        account = people.open_account(connection, "A machine", 0)
        key = keys.create(connection, accounts.peppers, account, KeySettings(), 0)
    accounts.close()
    return {"tmp": str(folder), "account": account, "key": keys.key_id(key)}


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_number_that_makes_no_sense_is_refused(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, command: str, option: str, value: str
) -> None:
    monkeypatch.setenv("UNMASK_HOME", places["tmp"])
    monkeypatch.setattr("unmask.server.serve", lambda _: pytest.fail("the server was started"))
    arguments = [argument.format(**places) for argument in NUMBERS[command][0]]
    with pytest.raises((UnmaskError, CycloptsError)) as refused:
        build_app("*")(
            [*command.split(), *arguments, f"{option}={value}"],
            exit_on_error=False, print_error=False, result_action="return_value",
        )  # fmt: skip
    message = str(refused.value)
    names = {option, option.strip("-").replace("-", "_"), option.strip("-").removesuffix("-mb").replace("-", "_")}
    assert any(name in message for name in names | {"dimensions", "amount of dollars", "plan 'small'"}), message
    assert "\n" not in message.strip() and len(message) < 400


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_of_keys_and_plans(tmp_path: Path, name: str, value: int) -> None:
    accounts = Accounts(f"sqlite:///{tmp_path / 'accounts.sqlite'}", pepper=tmp_path / "pepper")
    with pytest.raises(UsageError, match=f"{name}={value}"):
        KeySettings(**{name: value})  # pyright: ignore[reportArgumentType]
    limits = {"requests_per_minute": None, "tokens_per_minute": None, name: value}
    with accounts.database.begin() as connection, pytest.raises(UsageError, match="limits greater than 0"):
        set_plan(connection, RatePlan("small", **limits))
    accounts.close()
    with pytest.raises(UsageError):
        parse_whole_number(str(value), name)


@pytest.mark.parametrize("text", ["0", "-0", "-1", "1.5", "1e3", "٣", "５", "0x10", "nan", "9" * 13])
def test_whole_numbers_in_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"the limit: .* is no whole number greater than 0"):
        parse_whole_number(text, "the limit")


@pytest.mark.parametrize("text", ["-5", "1e3", "1_000", "1,000.00", "５", "0.0000000001", "nan", "inf", "", "0x10"])
def test_amounts_in_forms(text: str) -> None:
    with pytest.raises(UsageError, match="no amount of dollars"):
        parse_amount(text)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_settings_of_a_server(value: float) -> None:
    numbers = [
        name
        for name, default in vars(ServeSettings()).items()
        if isinstance(default, int | float) and not isinstance(default, bool)
    ]
    assert len(numbers) > 10
    for name in numbers:
        if value == 0 and name in ("port", "cache_bytes", "free_credit", "replica_gpus", "stop_delay_s"):
            continue  # any free port, no cache, no credit, no GPU, no delay
        with pytest.raises(UsageError, match=name):
            ServeSettings(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("option", ["max_length", "dimensions"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "²", "9" * 20])
def test_options_of_an_evaluated_model(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=option):
        open_model(f"{TINY}?{option}={value}")


@pytest.mark.parametrize("value", [0, -1])
def test_arguments_of_an_encoder(value: int) -> None:
    with pytest.raises(UsageError, match=f"max_length={value}"):
        Encoder.load(TINY, max_length=value)
    with pytest.raises(UsageError, match=f"dimensions={value}"):
        Encoder.load(TINY).encode("a text", dimensions=value)
