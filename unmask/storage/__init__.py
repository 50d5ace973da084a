"""The database, its one writer, the tables with their migrations, and backups."""
