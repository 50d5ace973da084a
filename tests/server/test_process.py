"""The process of a server: signals at every moment of its life."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.fork_server import fork_server
from unmask.api.settings import ServeSettings
from unmask.server import process


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def serve_with_hangups(model: Path) -> None:
    """Serve until the server is ready, with a SIGHUP at the start, once it is ready, and after its end."""
    build = process.build_application

    def build_and_hang_up(settings: ServeSettings) -> Any:
        hang_up()
        return build(settings)

    def stop(*arguments: Any) -> None:
        hang_up()
        os.kill(os.getpid(), signal.SIGTERM)

    process.build_application, process.announce = build_and_hang_up, stop
    name = str(model)
    code = process.serve(ServeSettings(port=0, models=(name,), warm=(name,)))
    hang_up()
    sys.exit(code)


def test_a_hangup_at_any_moment_ends_no_server(tiny_llama: Path) -> None:
    server = fork_server().Process(target=serve_with_hangups, args=(tiny_llama,))
    server.start()
    try:
        server.join(120)
        assert server.exitcode == 0
    finally:
        server.kill()
        server.join()
        server.close()
