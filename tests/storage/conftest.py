"""Fixtures of the storage tests: each runs on SQLite and on a real Postgres."""

from tests.storage.databases import database, empty_url, peppers, url  # noqa: F401
