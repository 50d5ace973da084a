"""Every test of storage runs twice: on SQLite, and on a real Postgres."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.accounts.postgres import Cluster
from unmask.accounts import Accounts
from unmask.storage.database import Database
from unmask.accounts.keys import Peppers


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
def url_of_nothing(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without any tables."""
    if request.param == "postgresql":
        postgres: Cluster = request.getfixturevalue("postgres")
        return postgres.empty()
    return f"sqlite:///{tmp_path / 'new.sqlite'}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def peppers(tmp_path: Path) -> Peppers:
    return Peppers(tmp_path / "pepper")


@pytest.fixture
def accounts(url: str, tmp_path: Path) -> Iterator[Accounts]:
    service = Accounts(url, pepper=tmp_path / "pepper", free_credit=1_000_000_000)
    yield service
    service.close()
