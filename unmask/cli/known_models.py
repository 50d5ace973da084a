"""Check of loaded models against the catalogue, for commands that load models without a server."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from unmask.errors import UnmaskError
from unmask.terminal import say

if TYPE_CHECKING:
    from unmask.catalogue import Catalogue
    from unmask.encoder import Encoder

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def checks_known_models(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a command: a model whose files a catalogue record knows must give the record's canary vector."""

    @wraps(command)
    def run(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with known_model_check():
            return command(*arguments, **options)

    return run


@contextmanager
def known_model_check() -> Iterator[None]:
    """Check every model that is loaded during the block. The catalogue is read when the first one is loaded."""
    from unmask.encoder.load_check import checking_loads

    catalogues: list[Catalogue] = []

    def check(encoder: "Encoder") -> None:
        from unmask.catalogue.known_vectors import check_known_vectors

        if not catalogues:
            catalogues.append(_catalogue())
        check_known_vectors(encoder, catalogues[0])

    with checking_loads(check):
        yield


def _catalogue() -> "Catalogue":
    """Return the shipped records, with the operator's own where UNMASK_HOME has a database."""
    from unmask.catalogue import Catalogue
    from unmask.home import home

    if (home() / "accounts" / "accounts.sqlite").is_file():
        from unmask.catalogue.store import read_catalogue
        from unmask.storage.database import Database, default_url

        try:
            with closing(Database(default_url())) as database, database.read() as connection:
                return read_catalogue(connection).catalogue
        except UnmaskError as error:
            say(f"models are compared with the shipped records alone, since the catalogue cannot be read: {error}")
    return Catalogue.shipped()
