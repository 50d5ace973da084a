"""Databases for the tests of what the operator adds: SQLite, and a real Postgres."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.accounts.postgres import Cluster
from unmask.storage.database import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A new, migrated database."""
    if request.param == "postgresql":
        postgres: Cluster = request.getfixturevalue("postgres")
        url = postgres.database()
    else:
        url = f"sqlite:///{tmp_path / 'accounts.sqlite'}"
    made = Database(url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Database]:
    """A new database in a file, for what does not depend on its kind."""
    made = Database(f"sqlite:///{tmp_path / 'own.sqlite'}")
    made.migrate()
    yield made
    made.close()
