"""Latency that serving through a provider adds, at 200 requests a second over a provider that answers at once.

    python benchmarks/provider_latency.py [--rate 200] [--seconds 20] [--rounds 3]

Three real processes: a stub provider that knows the right vectors, `unmask serve` before it, and this one, which sends
the same requests to either in turns, at random moments. What is added is everything that a request takes in the
server: HTTP, parsing, tokenising, choosing, the request to the provider, its checks, and the answer.
"""

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from open_loop import Client, load
from provider_chaos import free_port, serve, wait_until_ready

from unmask.catalogue import record_for
from unmask.encoder import Encoder

TEXT = "A ferry leaves the small harbour twice a day."


class Stub:
    """A provider of OpenAI's kind that computes a text's vector once."""

    def __init__(self, model: str) -> None:
        self._encoder = Encoder.load(model)
        self._vectors: dict[str, str] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                if head.startswith("get "):  # /ready
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                length = int(head.partition("content-length:")[2].split("\r\n")[0])
                texts = json.loads(await reader.readexactly(length))["input"]
                texts = [texts] if isinstance(texts, str) else texts
                data = [{"index": index, "embedding": self._vector(text)} for index, text in enumerate(texts)]
                body = json.dumps({"data": data, "usage": {"prompt_tokens": len(texts)}}).encode()
                fields = f"content-type: application/json\r\ncontent-length: {len(body)}"
                writer.write(f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _vector(self, text: str) -> str:
        if text not in self._vectors:
            vector: np.ndarray = self._encoder.encode(text, normalize=True)[0]
            self._vectors[text] = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return self._vectors[text]


async def run_stub(model: str, port: int) -> None:
    """Serve the stub until the process is ended."""
    server = await asyncio.start_server(Stub(model).serve, "127.0.0.1", port)
    await server.serve_forever()


@contextmanager
def processes(model: str, folder: Path) -> Iterator[dict[str, int]]:
    """Run the stub and the server before it. Yields the port of each way."""
    ports = {"direct": free_port(), "through unmask": free_port()}
    file = folder / "providers.toml"
    id = record_for(model).id
    url = f"http://127.0.0.1:{ports['direct']}/v1"
    file.write_text(
        f'remote_only = ["{id}"]\n[[provider]]\nname = "stub"\nkind = "openai"\nurl = "{url}"\nprivate = true\n'
        f'max_parallel = 256\n[[provider.model]]\nid = "{id}"\n'
    )
    running = [subprocess.Popen([sys.executable, __file__, "--model", model, "--stub", str(ports["direct"])])]
    try:
        wait_until_ready(ports["direct"])
        running.append(serve(model, ports["through unmask"], "--providers", str(file), home=folder))
        wait_until_ready(ports["through unmask"])
        yield ports
    finally:
        for process in running:
            process.terminate()
            process.wait(60)


async def measure(arguments: argparse.Namespace, ports: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Measure both ways in turns. Returns the median over rounds of median and p99, in milliseconds."""
    body = json.dumps({"model": record_for(arguments.model).id, "input": TEXT, "encoding_format": "base64"}).encode()
    ways = {name: Client(f"http://127.0.0.1:{port}") for name, port in ports.items()}
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, client in ways.items():
            answers = await load(client, lambda number: (body, ""), arguments.rate, arguments.seconds, turn)
            assert all(answer.status == 200 for answer in answers), name
            times = sorted(answer.milliseconds - answer.late_ms for answer in answers)
            if turn:  # the first one warms up
                figures[name].append((statistics.median(times), times[int(0.99 * len(times))]))
    return {
        name: (statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows))
        for name, rows in figures.items()
    }


def main() -> int:
    """Parse the arguments, and run the stub or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "tests" / "golden" / "tiny_llama"))
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stub:
        asyncio.run(run_stub(arguments.model, arguments.stub))
        return 0
    with tempfile.TemporaryDirectory() as folder, processes(arguments.model, Path(folder)) as ports:
        middle = asyncio.run(measure(arguments, ports))
    for name, (median, p99) in middle.items():
        print(f"{name}: median {median:.2f} ms, p99 {p99:.2f} ms")
    added = [through - direct for direct, through in zip(middle["direct"], middle["through unmask"], strict=True)]
    print(f"added at {arguments.rate:g} requests/s: median {added[0]:.2f} ms, p99 {added[1]:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
