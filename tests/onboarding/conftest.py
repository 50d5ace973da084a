"""Databases for the tests of this package: SQLite, and a real Postgres."""

from tests.storage.databases import database, sqlite, url  # noqa: F401
