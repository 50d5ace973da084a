"""Latency that serving through a provider adds, at 200 requests a second over a provider that answers at once.

    python benchmarks/provider_latency.py [--rate 200] [--seconds 20] [--rounds 3] [--litellm PROGRAM]

Real processes: a stub provider that knows the right vectors, `unmask serve` before it, LiteLLM's proxy before it where
it is installed (`make bench` does that, in an environment of its own), and this one, which sends the same requests to
each in turns, at random moments, through aiohttp. What is added is everything that a request takes in the server: HTTP,
parsing, tokenising, choosing, the request to the provider, its checks, and the answer. Processor time is that of the
server's process; it says more than latency does on a machine that is busy with other work.

A fourth process forwards bytes and does nothing else, with the HTTP libraries of unmask (uvicorn, httptools, uvloop and
aiohttp). It is what they cost alone: no server on them is faster.
"""

import argparse
import asyncio
import base64
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import uvicorn
from open_loop import load
from provider_chaos import free_port, serve, wait_until_ready
from turns import turns

from unmask.catalogue import record_for
from unmask.encoder import Encoder

TEXT = "A ferry leaves the small harbour twice a day."
KEY = f"sk-{secrets.token_hex(16)}"  # LiteLLM's proxy does not start without one; the others read none
LIBRARIES = "through uvicorn and aiohttp alone"
LITELLM = Path(sys.prefix) / "peers" / "litellm" / "bin" / "litellm"


@dataclass
class Way:
    """A server that requests go to.

    Attributes:
        url: its address.
        process: the server; its processor time counts.
        times: median and p99 of each round, in milliseconds.
        processor_ms: processor time per request of each round.
    """

    url: str
    process: psutil.Process
    times: list[tuple[float, float]] = field(default_factory=list)
    processor_ms: list[float] = field(default_factory=list)


class AiohttpClient:
    """Sends requests through aiohttp, as a program without a router would."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, f"{url}/v1/embeddings"

    async def post(self, body: bytes, headers: str = "") -> tuple[int, dict[str, str], bytes]:
        """Send one request. Returns status, no headers, and the body."""
        own = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        async with self._session.post(self._url, data=body, headers=own) as response:
            return response.status, {}, await response.read()


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
                data = [
                    {"object": "embedding", "index": index, "embedding": self._vector(text)}
                    for index, text in enumerate(texts)
                ]
                usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
                body = json.dumps({"object": "list", "model": "stub", "data": data, "usage": usage}).encode()
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


def run_forwarder(url: str, port: int) -> None:
    """Send the body of each request to a provider, and its answer back, until the process is ended."""
    session: aiohttp.ClientSession | None = None

    async def forward(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        nonlocal session
        message = await receive()
        status, content = 200, b""  # of /ready
        if scope["method"] == "POST":
            body = message["body"]
            while message["more_body"]:
                message = await receive()
                body += message["body"]
            if session is None:
                session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
            status, _, content = await AiohttpClient(session, url).post(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    uvicorn.run(
        forward, port=port, http="httptools", loop="uvloop", lifespan="off", log_level="error", access_log=False
    )


def start_litellm(program: Path, model: str, stub: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start LiteLLM's proxy before the stub."""
    entry = {"model": f"openai/{model}", "api_base": f"http://127.0.0.1:{stub}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    models = [{"model_name": model, "litellm_params": entry}]
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": KEY}}))
    command = [program, "--config", config, "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def wait_for_vectors(url: str, body: bytes, seconds: float = 180) -> None:
    """Wait until a server answers with vectors.

    Raises:
        SystemExit: it does not within `seconds`.
    """
    status = 0
    async with aiohttp.ClientSession() as session:
        for _ in range(int(seconds)):
            try:
                status, _, _ = await AiohttpClient(session, url).post(body)
            except aiohttp.ClientError:
                status = 0
            if status == 200:
                return
            await asyncio.sleep(1)
    raise SystemExit(f"{url} gave no vectors within {seconds:g} seconds: its last status was {status}")


@contextmanager
def processes(model: str, litellm: Path, folder: Path) -> Iterator[dict[str, Way]]:
    """Run the stub and the servers before it. Yields the ways to ask for vectors, the direct one first."""
    stub, port = free_port(), free_port()
    file = folder / "providers.toml"
    id = record_for(model).id
    file.write_text(
        f'remote_only = ["{id}"]\n[[provider]]\nname = "stub"\nkind = "openai"\nurl = "http://127.0.0.1:{stub}/v1"\n'
        f'private = true\nmax_parallel = 256\n[[provider.model]]\nid = "{id}"\n'
    )
    running = {"direct": subprocess.Popen([sys.executable, __file__, "--model", model, "--stub", str(stub)])}
    ports = {"direct": stub, LIBRARIES: free_port(), "through unmask": port}
    try:
        wait_until_ready(stub)
        forwarder = ["--forward", f"http://127.0.0.1:{stub}", "--port", str(ports[LIBRARIES])]
        running[LIBRARIES] = subprocess.Popen([sys.executable, __file__, *forwarder])
        wait_until_ready(ports[LIBRARIES])
        running["through unmask"] = serve(model, port, "--providers", str(file), home=folder)
        wait_until_ready(port)
        if litellm.is_file():
            ports["through LiteLLM"] = free_port()
            running["through LiteLLM"] = start_litellm(litellm, id, stub, ports["through LiteLLM"], folder)
        else:
            print(f"LiteLLM is not measured: there is no {litellm}, see `make bench`")
        yield {
            name: Way(f"http://127.0.0.1:{ports[name]}", psutil.Process(process.pid))
            for name, process in running.items()
        }
    finally:
        for process in running.values():
            process.terminate()
            process.wait(60)


async def measure(arguments: argparse.Namespace, ways: dict[str, Way]) -> None:
    """Measure all ways in turns."""
    body = json.dumps({"model": record_for(arguments.model).id, "input": TEXT, "encoding_format": "base64"}).encode()
    for way in ways.values():
        await wait_for_vectors(way.url, body)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for turn in range(arguments.rounds + 1):
            for name, way in turns(ways.items(), turn):
                before, client = _processor_seconds(way.process), AiohttpClient(session, way.url)
                answers = await load(client, lambda number: (body, ""), arguments.rate, arguments.seconds, turn)
                assert all(answer.status == 200 for answer in answers), name
                times = sorted(answer.milliseconds - answer.late_ms for answer in answers)
                if turn:  # the first one warms up
                    way.times.append((statistics.median(times), times[int(0.99 * len(times))]))
                    spent = _processor_seconds(way.process) - before
                    way.processor_ms.append(1000 * spent / len(answers))


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> int:
    """Parse the arguments, and run the stub or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "tests" / "golden" / "tiny_llama"))
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litellm", type=Path, default=LITELLM, help="program of LiteLLM's proxy")
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--forward", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stub:
        asyncio.run(run_stub(arguments.model, arguments.stub))
        return 0
    if arguments.forward:
        run_forwarder(arguments.forward, arguments.port)
        return 0
    with (
        tempfile.TemporaryDirectory() as folder,
        processes(arguments.model, arguments.litellm, Path(folder)) as ways,
    ):
        asyncio.run(measure(arguments, ways))
    direct = ways["direct"].times
    for name, way in ways.items():
        median, p99 = (statistics.median(row[i] for row in way.times) for i in (0, 1))
        added = [
            statistics.median(row[i] for row in way.times) - statistics.median(r[i] for r in direct) for i in (0, 1)
        ]
        print(
            f"{name}: median {median:.2f} ms, p99 {p99:.2f} ms; added {added[0]:.2f} and {added[1]:.2f} ms; processor "
            f"{statistics.median(way.processor_ms):.2f} ms per request"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
