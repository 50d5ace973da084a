"""Kill a provider while 64 callers spend: every request that has time is answered, rightly, and charged once.

    python benchmarks/provider_chaos.py [--model FOLDER] [--seconds 60] [--callers 64]

Four real processes: two `unmask serve` with the model, one `unmask serve` with accounts that answers through them
alone, and this one, which sends requests, kills a provider with SIGKILL, starts it again, and checks vectors and books.
Exit code 1: an answer was not 200, a vector was wrong, or the books do not balance.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from open_loop import Client

from unmask.accounts import Accounts, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings
from unmask.accounts.verification import verify
from unmask.catalogue import record_for
from unmask.encoder import Encoder
from unmask.storage.database import now_ms

PRICE = 8_000_000  # nano-dollars per million tokens
TEXTS = [f"{'some words ' * length}number {length}" for length in range(1, 40)]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def serve(model: str, port: int, *options: str, home: Path) -> subprocess.Popen[bytes]:
    """Start `unmask serve` in a process of its own."""
    command = [sys.executable, "-m", "unmask", "serve", "--model", model, "--port", str(port), "--log-level", "error"]
    environment = os.environ | {"UNMASK_HOME": str(home)}
    return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)


def wait_until_ready(port: int, seconds: float = 180) -> None:
    """Wait until /ready of a server answers with 200.

    Raises:
        SystemExit: it does not within `seconds`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server on port {port} did not become ready within {seconds:g} seconds")


@contextmanager
def processes(model: str, folder: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int], int]]:
    """Run two providers and the server before them. Yields the providers' processes, their ports, the server's port."""
    ports = [free_port(), free_port()]
    front_port = free_port()
    id = record_for(model).id
    blocks = [
        f'[[provider]]\nname = "gpu-{number}"\nkind = "unmask"\nurl = "http://127.0.0.1:{port}/v1"\nprivate = true\n'
        f'max_parallel = 64\n[[provider.model]]\nid = "{id}"\ncost = "0.004"\n'
        for number, port in enumerate(ports)
    ]
    file = folder / "providers.toml"
    file.write_text(f'remote_only = ["{id}"]\n' + "".join(blocks))
    running = [serve(model, port, home=folder) for port in ports]
    try:
        for port in ports:
            wait_until_ready(port)
        running.append(serve(model, front_port, "--accounts", "--providers", str(file), home=folder))
        wait_until_ready(front_port)
        yield running, ports, front_port
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(60)


def open_account(folder: Path, model: str) -> str:
    """Open an account with credit in the server's database. Returns a key."""
    accounts = Accounts(f"sqlite:///{folder / 'accounts' / 'accounts.sqlite'}", pepper=folder / "accounts" / "pepper")
    with accounts.database.begin() as connection:
        id = people.open_account(connection, "caller", now_ms())
        ledger.top_up(connection, id, 10**12, "payment", now_ms())
        tariff.set_price(connection, tariff.TariffPrice(model, "default", PRICE), now_ms())
        key = keys.create(connection, accounts.peppers, id, KeySettings(), now_ms())
    accounts.close()
    return key


async def spend(
    client: Client, model: str, right: np.ndarray, end: float, seen: Counter[str], charged: list[int], seed: int
) -> None:
    """Send requests one after the other until `end`, and check every answer."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        row = draw.randrange(len(TEXTS))
        body = json.dumps({"model": model, "input": TEXTS[row], "encoding_format": "base64"}).encode()
        status, headers, content = await client.post(body, "request-deadline-ms: 10000\r\n")
        seen[str(status)] += 1
        if status != 200:
            continue
        seen[headers["x-unmask-provider"]] += 1
        seen["moved"] += headers["x-unmask-attempts"] != "1"
        charged.append(int(headers["x-unmask-cost-nanodollars"]))
        vector = np.frombuffer(base64.b64decode(json.loads(content)["data"][0]["embedding"]), dtype="<f4")
        seen["wrong vectors"] += bool(1 - vector @ right[row] > 1e-5)


async def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Run the whole experiment. Returns the exit code."""
    model = arguments.model
    id = record_for(model).id
    right = Encoder.load(model).encode(TEXTS, normalize=True)
    seen: Counter[str] = Counter()
    charged: list[int] = []
    with processes(model, folder) as (running, ports, front_port):
        client = Client(f"http://127.0.0.1:{front_port}", open_account(folder, id))
        began = time.monotonic()
        end = began + arguments.seconds
        callers = [
            asyncio.create_task(spend(client, id, right, end, seen, charged, seed)) for seed in range(arguments.callers)
        ]
        await asyncio.sleep(arguments.seconds / 4)
        running[0].kill()
        running[0].wait()
        await asyncio.sleep(arguments.seconds / 4)
        running[0] = serve(model, ports[0], home=folder)
        await asyncio.gather(*callers)
    accounts = Accounts(f"sqlite:///{folder / 'accounts' / 'accounts.sqlite'}", pepper=folder / "accounts" / "pepper")
    with accounts.database.read() as connection:
        books = verify(connection)
    accounts.close()
    failed = sum(count for status, count in seen.items() if status.isdigit() and status != "200")
    print(
        f"{seen['200']} answers in {arguments.seconds:g} s ({dict(seen)}), {failed} failed, "
        f"{seen['wrong vectors']} wrong vectors; charged {sum(charged)} nano-dollars by the answers, "
        f"{books.settled} by the books, drift: {len(books.drift) or 'none'}"
    )
    return int(bool(failed or seen["wrong vectors"] or books.drift or books.settled != sum(charged) or books.held))


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "tests" / "golden" / "tiny_llama"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--callers", type=int, default=64)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(parser.parse_args(), Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
