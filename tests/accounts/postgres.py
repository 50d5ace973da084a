"""A Postgres of the tests' own: made in a temporary folder, reached by a socket in it, gone at the end."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from unmask.storage.database import Database


def server_programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, or None where no Postgres is installed."""
    found = shutil.which("pg_ctl")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@dataclass
class Cluster:
    """A running server."""

    folder: Path
    user: str
    _names: Iterator[int] = field(default_factory=itertools.count)

    def url(self, name: str) -> str:
        return f"postgresql://{self.user}@/{name}?host={self.folder}"

    def database(self) -> str:
        """The URL of a new database with the newest tables, empty."""
        name = f"test_{next(self._names)}"
        self._run(f"CREATE DATABASE {name} TEMPLATE unmask_template")
        return self.url(name)

    def empty(self) -> str:
        """The URL of a new database without any tables."""
        name = f"test_{next(self._names)}"
        self._run(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self._run(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def prepare(self) -> None:
        self._run("CREATE DATABASE unmask_template")
        template = Database(self.url("unmask_template"))
        template.migrate()
        template.close()

    def _run(self, statement: str) -> None:
        url = sa.make_url(self.url("postgres")).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def cluster(programs: Path) -> Iterator[Cluster]:
    """A server for the block. It does not run as root, which Postgres refuses."""
    owner = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    other = owner if os.getuid() == 0 else None
    # Not pytest's folder: root's are closed to others, and a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="unmask-pg-"))
    try:
        if other:
            shutil.chown(folder, owner)
        # What a machine that loses its power may forget is of no interest here, and flushing takes time.
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"

        def call(*command: str) -> None:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                check=False,
                user=other,
            )
            assert done.returncode == 0, done.stderr

        data = str(folder / "data")
        call(str(programs / "initdb"), "--pgdata", data, "--auth", "trust", "--username", owner, "--encoding", "UTF8")
        start = ("--wait", "--log", str(folder / "log"), "--options", options)
        call(str(programs / "pg_ctl"), "start", "--pgdata", data, *start)
        try:
            running = Cluster(folder, owner)
            running.prepare()
            yield running
        finally:
            call(str(programs / "pg_ctl"), "stop", "--pgdata", data, "--mode", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
