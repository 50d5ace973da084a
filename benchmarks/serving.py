"""Measure the cost of HTTP over the engine, the effect of overload, and the time to start.

    python benchmarks/serving.py                      # all four
    python benchmarks/serving.py single saturation    # or some: single, saturation, overload, start

A real `unmask serve` in a process of its own, without a memory of recent vectors, against the same model in an engine
of this process, which is called directly. The two are never busy at once. Load comes from an open loop.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import uvloop
from open_loop import Answer, Client, load

from unmask.cli import keep_few_products
from unmask.encoder import Encoder
from unmask.engine import Engine

# fmt: off
WORDS = ["vector", "model", "encode", "attention", "token", "layer", "mask", "noise", "training", "query", "passage",
         "river", "stone", "letter", "morning", "window", "garden", "market", "winter", "paper", "island", "summer"]
# fmt: on
PARTS = ("single", "saturation", "overload", "start")
DEADLINE_S = 5.0


class Subject:
    """`unmask serve` in a process of its own."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-m", "unmask", "serve", "--port", "0", "--model", model]
        command += ["--cache-mb", "0", "--log-level", "error"]
        began = time.perf_counter()
        # A package that a tool installed has its bytecode. A source tree has it after the first start.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.url = line.split()[2].removesuffix("/v1")
        self.listening_s = time.perf_counter() - began
        asyncio.run(self._first(model))
        self.first_vector_s = time.perf_counter() - began

    async def _first(self, model: str) -> None:
        client = Client(self.url)
        status, _, body = await client.post(request(model, ["hello"]), "prefer: wait=60\r\n")
        client.close()
        if status != 200:
            raise SystemExit(f"the first request was answered {status}: {body.decode()}")

    @property
    def resident_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    @property
    def processor_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def serving(model: str) -> Iterator[Subject]:
    subject = Subject(model)
    try:
        yield subject
    finally:
        subject.stop()


def request(model: str, texts: list[str]) -> bytes:
    return json.dumps({"model": model, "input": texts, "encoding_format": "base64"}).encode()


def text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def short(chance: random.Random) -> list[list[str]]:
    return [[text(chance, chance.randint(4, 12))] for _ in range(300)]


def natural(chance: random.Random) -> list[list[str]]:
    """Log-normal lengths, median 30 words."""
    return [[text(chance, min(300, int(chance.lognormvariate(3.4, 0.9)) + 1)) for _ in range(8)] for _ in range(14)]


def long(chance: random.Random) -> list[list[str]]:
    return [[text(chance, 330), text(chance, 330)] for _ in range(7)]


async def single(engine: Engine, client: Client, model: str, rounds: int) -> dict[str, float]:
    """Measure one short request alone, in milliseconds: direct, over HTTP, and the difference; medians."""
    chance, direct, http = random.Random(1), [], []
    for number in range(rounds + 5):
        words = [text(chance, 8)]
        began = time.perf_counter()
        await engine.run(await engine.prepare(words))
        between = time.perf_counter()
        status, _, _ = await client.post(request(model, words))
        ended = time.perf_counter()
        assert status == 200
        if number >= 5:
            direct.append((between - began) * 1000)
            http.append((ended - between) * 1000)
    added = [after - before for before, after in zip(direct, http, strict=True)]
    return {
        "direct": statistics.median(direct),
        "http": statistics.median(http),
        "added": statistics.median(http) - statistics.median(direct),
        "added, median of pairs": statistics.median(added),
    }


async def saturation(engine: Engine, client: Client, model: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measure tokens per second of each mix, direct and over HTTP. All requests of a round are sent at once."""
    rates: dict[str, list[tuple[float, float]]] = {}

    async def directly(requests: list[list[str]]) -> float:
        async def one(texts: list[str]) -> int:
            prompts = await engine.prepare(texts)
            await engine.run(prompts)
            return sum(len(prompt.ids) for prompt in prompts)

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(texts) for texts in requests)))
        return tokens / (time.perf_counter() - began)

    async def over_http(requests: list[list[str]]) -> float:
        bodies = [request(model, texts) for texts in requests]
        began = time.perf_counter()
        answers = await asyncio.gather(*(client.post(body, "request-deadline-ms: 600000\r\n") for body in bodies))
        seconds = time.perf_counter() - began
        assert {status for status, _, _ in answers} == {200}
        return sum(json.loads(body)["usage"]["total_tokens"] for _, _, body in answers) / seconds

    for mix in (short, natural, long):
        for number in range(rounds):
            requests = mix(random.Random(number))
            if number % 2:
                served, direct = await over_http(requests), await directly(requests)
            else:
                direct, served = await directly(requests), await over_http(requests)
            rates.setdefault(mix.__name__, []).append((direct, served))
    return rates


async def overload(subject: Subject, client: Client, model: str, seconds: float) -> dict[str, object]:
    """Send twice the requests that the server can answer, for `seconds`, each with a deadline."""

    async def calm() -> float:
        chance, times = random.Random(7), []
        for _ in range(30):
            began = time.perf_counter()
            status, _, _ = await client.post(request(model, [text(chance, 8)]))
            assert status == 200
            times.append((time.perf_counter() - began) * 1000)
        return statistics.median(times)

    async def capacity() -> float:
        bodies = [request(model, texts) for texts in natural(random.Random(3))]
        began = time.perf_counter()
        await asyncio.gather(*(client.post(body, "request-deadline-ms: 600000\r\n") for body in bodies))
        return len(bodies) / (time.perf_counter() - began)

    before, can = await calm(), await capacity()
    chance = random.Random(11)
    bodies = [request(model, texts) for seed in range(40) for texts in natural(random.Random(100 + seed))]
    chance.shuffle(bodies)
    deadline = f"request-deadline-ms: {int(DEADLINE_S * 1000)}\r\n"
    resident, first = [subject.resident_mb], asyncio.get_running_loop().time()

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            resident.append(subject.resident_mb)

    watching = asyncio.ensure_future(watch())
    answers = await load(client, lambda number: (bodies[number % len(bodies)], deadline), 2 * can, seconds, 5)
    took = asyncio.get_running_loop().time() - first
    refused = [answer for answer in answers if answer.status == 429]
    promise = await keeps_its_word(client, bodies[0], deadline, refused)
    watching.cancel()
    admitted = [answer.milliseconds - answer.late_ms for answer in answers if answer.status == 200]
    late = sum(time > DEADLINE_S * 1000 for time in admitted)
    half = len(resident) // 2
    return {
        "requests/s": round(2 * can, 2),
        "seconds": round(took, 1),
        "answers": dict(Counter(answer.status for answer in answers)),
        "admitted: median and longest ms": (round(statistics.median(admitted)), round(max(admitted))),
        "admitted later than the deadline": late,
        "refused within ms, median and longest": spread([answer.milliseconds - answer.late_ms for answer in refused]),
        "Retry-After, smallest and largest": spread([float(one.headers["retry-after"]) for one in refused], min),
        "admitted after Retry-After": promise,
        "resident MB at the start, halfway, at the end": [round(resident[at]) for at in (0, half, -1)],
        "short request before and after, ms": (round(before, 1), round(await calm(), 1)),
    }


async def keeps_its_word(client: Client, body: bytes, headers: str, refused: list[Answer]) -> str:
    """Return True if the server accepts a caller who waited as long as the last refusal said."""
    if not refused:
        return "nothing was refused"
    await asyncio.sleep(float(max(refused, key=lambda answer: answer.due).headers["retry-after"]))
    status, _, _ = await client.post(body, headers)
    return "yes" if status == 200 else f"no: {status}"


def spread(values: list[float], low: Callable[[list[float]], float] = statistics.median) -> tuple[float, float] | None:
    return (round(low(values), 1), round(max(values), 1)) if values else None


def start(model: str, rounds: int) -> None:
    """Measure the time from the command to the first vector, and the memory after it."""

    for _ in range(rounds):
        with serving(model) as subject:
            print(
                f"listening after {subject.listening_s:.1f} s, first vector after {subject.first_vector_s:.1f} s, "
                f"processor {subject.processor_s:.1f} s, resident {subject.resident_mb:.0f} MB"
            )
    weights = Encoder.load(model).num_parameters * 4 / 1e6
    print(f"weights {weights:.0f} MB")


async def against(engine: Engine, subject: Subject, arguments: argparse.Namespace) -> None:
    client = Client(subject.url)
    if "single" in arguments.parts:
        times = "  ".join(
            f"{name} {ms:.2f}" for name, ms in (await single(engine, client, arguments.model, 100)).items()
        )
        print(f"one short request alone, ms: {times}", flush=True)
    if "saturation" in arguments.parts:
        for mix, rates in (await saturation(engine, client, arguments.model, arguments.rounds)).items():
            ratios = [served / direct for direct, served in rates]
            print(
                f"{mix:8} tokens/s direct {statistics.median(d for d, _ in rates):.0f}, "
                f"over HTTP {statistics.median(s for _, s in rates):.0f}, ratio {statistics.median(ratios):.1%} "
                f"({', '.join(f'{ratio:.1%}' for ratio in ratios)})",
                flush=True,
            )
    if "overload" in arguments.parts:
        for name, value in (await overload(subject, client, arguments.model, arguments.seconds)).items():
            print(f"{name}: {value}", flush=True)
    client.close()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    options.add_argument("--model", default="unmask/smollm2-135m-embed")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=60, help="of overload")
    arguments = options.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        options.error(f"{unknown.pop()!r} is none of {', '.join(PARTS)}")
    keep_few_products()  # as the server does
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if "start" in arguments.parts:
        start(arguments.model, arguments.rounds)
    if set(arguments.parts) - {"start"}:
        engine = Engine(Encoder.load(arguments.model))
        try:
            with serving(arguments.model) as subject:
                uvloop.run(against(engine, subject, arguments))
        finally:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
