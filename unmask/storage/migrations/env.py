"""Alembic's entry point. It is only ever run by `unmask.storage.database`, which brings the connection."""

from alembic import context

from unmask.storage.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
)
context.run_migrations()
