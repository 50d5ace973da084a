"""Databases for the tests: SQLite, and a real Postgres. Each conftest imports the fixtures it needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.accounts.postgres import Cluster
from unmask.accounts.keys import Peppers
from unmask.storage.database import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, migrated database."""
    if request.param == "postgresql":
        postgres: Cluster = request.getfixturevalue("postgres")
        return postgres.database()
    file = f"sqlite:///{tmp_path / 'accounts.sqlite'}"
    database = Database(file)
    database.migrate()
    database.close()
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without any tables."""
    if request.param == "postgresql":
        postgres: Cluster = request.getfixturevalue("postgres")
        return postgres.empty()
    return f"sqlite:///{tmp_path / 'new.sqlite'}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A new, migrated database, once on SQLite and once on Postgres."""
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A new, migrated SQLite database, for tests that do not depend on the kind."""
    database = Database(f"sqlite:///{tmp_path / 'own.sqlite'}")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def peppers(tmp_path: Path) -> Peppers:
    """A new pepper file."""
    return Peppers(tmp_path / "pepper")
