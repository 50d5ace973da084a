"""Fixtures of the account tests: each runs on SQLite and on a real Postgres."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.databases import database, empty_url, peppers, sqlite, url  # noqa: F401
from unmask.accounts import Accounts


@pytest.fixture
def accounts(url: str, tmp_path: Path) -> Iterator[Accounts]:  # noqa: F811
    """An `Accounts` service over a new database, with one dollar of free credit."""
    service = Accounts(url, pepper=tmp_path / "pepper", free_credit=1_000_000_000)
    yield service
    service.close()
