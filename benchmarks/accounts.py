"""Measure the time that accounts add to a request: two servers, with and without, under the same open load.

    python benchmarks/accounts.py
    python benchmarks/accounts.py --database postgresql://user@host/empty

Both are real server processes with a stub in place of the model, which answers at once, so that what differs is the
work of the accounts: key, limits, hold and settlement. Rounds alternate between the two. Beside the time that callers
see stands the processor time that the server took, which other work on the machine disturbs least. The exit code is 0
only if the medians of the rounds keep to the target.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import uvloop
from open_loop import Answer, Client, load
from stub_server import MODEL

from unmask.accounts import keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.verification import verify
from unmask.storage.database import Database, now_ms

TARGET_MEDIAN_MS, TARGET_P99_MS = 2.0, 8.0
BODY = json.dumps({"model": MODEL, "input": "a short text of some words", "encoding_format": "base64"}).encode()


def make_key(url: str, pepper: Path) -> str:
    """Make a database with one account that has credit, a plan with limits, and a key with limits. Returns the key."""
    database = Database(url)
    database.migrate()
    now = now_ms()
    with database.begin() as connection:
        if people.all_accounts(connection):
            raise SystemExit(f"{database.display_url} is in use: name a new database")
        tariff.set_price(connection, tariff.TariffPrice(MODEL, "default", 8_000_000), now)
        tariff.set_plan(connection, tariff.RatePlan("default", 10**6, 10**9))
        account = people.open_account(connection, "measured", now)
        ledger.top_up(connection, account, 10**14, "payment 1", now)
        limits = KeySettings(
            requests_per_minute=10**6, tokens_per_minute=10**9, spend_limit=10**14, spend_window="month"
        )
        made = keys.create(connection, Peppers(pepper), account, limits, now)
    database.close()
    return made


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    script = str(Path(__file__).with_name("stub_server.py"))
    process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise SystemExit("the server did not start")
    return process, url


def processor_ms(process: subprocess.Popen[str]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return (times.user + times.system) * 1000


def quantiles(answers: list[Answer]) -> tuple[float, float]:
    failures = [answer.status for answer in answers if answer.status != 200]
    if failures:
        raise SystemExit(f"{len(failures)} requests were not answered with 200 but with {sorted(set(failures))}")
    times = [answer.milliseconds for answer in answers]
    return float(np.median(times)), float(np.percentile(times, 99))


async def measure(
    clients: list[Client], processes: list[subprocess.Popen[str]], options: argparse.Namespace
) -> list[list[tuple[float, float, float]]]:
    """Measure median, p99 and CPU time per request in each round, without and with accounts."""
    times: list[list[tuple[float, float, float]]] = [[], []]
    for client in clients:
        await load(client, lambda _: (BODY, ""), options.rate, 2, 0)
    for number in range(options.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            before = processor_ms(processes[side])
            answers = await load(clients[side], lambda _: (BODY, ""), options.rate, options.seconds, number)
            used = (processor_ms(processes[side]) - before) / len(answers)
            times[side].append((*quantiles(answers), used))
    for client in clients:
        client.close()
    return times


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rate", type=float, default=200, help="requests per second")
    options.add_argument("--seconds", type=float, default=10, help="of a round")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--database", help="URL of a new database; left out, SQLite in a temporary folder")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.database or f"sqlite:///{folder}/accounts.sqlite"
        pepper = Path(folder) / "pepper"
        key = make_key(url, pepper)
        bare, bare_url = start("0")
        charged, charged_url = start("0", url, str(pepper))
        try:
            rounds = uvloop.run(measure([Client(bare_url), Client(charged_url, key)], [bare, charged], arguments))
        finally:
            for process in (bare, charged):
                process.terminate()
                process.wait(30)
                assert process.stdout is not None
                process.stdout.close()
        database = Database(url)
        with database.read() as connection:
            books = verify(connection)
        database.close()
    kind = "Postgres" if url.startswith("postgres") else "SQLite"
    print(
        f"{arguments.rate:g} requests/s, {arguments.rounds} rounds of {arguments.seconds:g} s each, "
        f"{os.cpu_count()} cores,"
    )
    print(f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}; milliseconds, medians of the rounds")
    print(f"{'':18} {'median':>8} {'p99':>8} {'processor':>10}")
    columns = range(3)
    medians = [[statistics.median(round[column] for round in side) for column in columns] for side in rounds]
    pairs = list(zip(*rounds, strict=True))
    added = [[after[column] - before[column] for before, after in pairs] for column in columns]
    middle = [statistics.median(values) for values in added]
    for name, values in zip(("without accounts", f"accounts, {kind}", "added"), [*medians, middle], strict=True):
        print(f"{name:18} {values[0]:8.2f} {values[1]:8.2f} {values[2]:10.2f}")
    each = "  ".join(f"{one:.2f}/{other:.2f}" for one, other in zip(*added[:2], strict=True))
    print(f"added per round    {each}")
    print(f"{books.charges} charges, drift: {len(books.drift) or 'none'}")
    return 0 if middle[0] <= TARGET_MEDIAN_MS and middle[1] <= TARGET_P99_MS and not books.drift else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
