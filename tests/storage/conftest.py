"""Fixtures of the storage tests: each runs on SQLite and on a real Postgres."""

from tests.storage.databases import database, empty_url, peppers, sqlite, url  # noqa: F401
