"""Kill the server at random moments while many callers spend, and count afterwards.

    python benchmarks/ledger_chaos.py --requests 100000 --keys 50 --kills 20
    python benchmarks/ledger_chaos.py --requests 100000 --keys 50 --kills 20 --database postgresql://user@host/empty

A real server process with real accounts, real HTTP and a stub in place of the model, or with `--providers` of two
providers of which one fails often. Callers note every answer they see. At the end the ledger is recomputed, and every
200 that a caller saw must be charged exactly once, at the price the answer named; with providers, its attempts must be
there, and every attempt's cost in the books exactly once. The exit code is 0 only then. The database must be new.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from stub_server import MODEL, serve

from unmask.accounts import costs, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.verification import verify
from unmask.storage.database import Database, now_ms
from unmask.storage.schema import accounts, charges, entries, provider_attempts, replays

PRICE = 8_000_000  # nano-dollars per million tokens
ALL_TIME = 10**6 * 24 * 3600 * 1000


@dataclass
class Seen:
    """Answers that the callers got."""

    charged: dict[str, int] = field(default_factory=dict)  # nano-dollars by charge, of answers without repetition
    replayed: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    twice: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Subject:
    """The server process, which can be killed and started again."""

    def __init__(self, database: str, pepper: Path, *, by_providers: bool = False) -> None:
        # Each server is a process forked from one that has imported everything, which is seconds of work.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["stub_server"])
        self._arguments = 10, database, pepper
        self._options = {"by_providers": by_providers}
        self.up = threading.Event()
        self.address = ("127.0.0.1", 0)
        self.start()

    def start(self) -> None:
        receiver, sender = self._processes.Pipe(duplex=False)
        self.process = self._processes.Process(target=serve, args=(*self._arguments, sender.send), kwargs=self._options)
        self.process.start()
        sender.close()
        try:
            host, port = receiver.recv().removeprefix("http://").split(":")
        except EOFError:
            raise SystemExit("the server did not start") from None
        self.address = (host, int(port))
        self.up.set()

    def kill(self) -> None:
        self.up.clear()
        self.process.kill()
        self.process.join(60)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(60)


def caller(key: str, subject: Subject, left: list[int], seen: Seen, seed: int) -> None:
    """Send requests until none is left. One in five carries an Idempotency-Key and is repeated until it is answered."""
    chance = random.Random(seed)
    connection: http.client.HTTPConnection | None = None
    while True:
        with seen.lock:
            if not left[0]:
                return
            left[0] -= 1
        words = chance.randint(1, 40)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        tries = 1
        if chance.random() < 0.2:
            headers["idempotency-key"] = f"{chance.getrandbits(64):x}"
            tries = 4
        if chance.random() < 0.3:
            headers["x-tier"] = "batch"
        body = json.dumps({"model": MODEL, "input": "word " * words, "encoding_format": "base64"})
        for _ in range(tries):
            subject.up.wait()
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(*subject.address, timeout=30)
                began = time.perf_counter()
                connection.request("POST", "/v1/embeddings", body, headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                if connection is not None:
                    connection.close()
                connection = None
                with seen.lock:
                    seen.statuses["lost"] += 1
                time.sleep(0.05)
                continue
            note(seen, answer, (time.perf_counter() - began) * 1000)
            if answer.status not in (409, 503):
                break
            time.sleep(0.1)


def note(seen: Seen, answer: http.client.HTTPResponse, milliseconds: float) -> None:
    charge, cost = answer.headers["x-unmask-charge"], answer.headers["x-unmask-cost-nanodollars"]
    with seen.lock:
        seen.statuses[str(answer.status)] += 1
        if answer.status != 200:
            return
        seen.milliseconds.append(milliseconds)
        if answer.headers["idempotent-replayed"]:
            seen.replayed[charge] += 1
        elif charge in seen.charged:
            seen.twice.append(charge)
        else:
            seen.charged[charge] = int(cost)


def prepare(url: str, pepper: Path, number: int) -> list[str]:
    """Make accounts with five keys each; every fourth account runs out of credit. Returns the keys."""
    database = Database(url)
    database.migrate()
    peppers, made, now = Peppers(pepper), [], now_ms()
    account = ""
    with database.begin() as connection:
        if people.all_accounts(connection):
            raise SystemExit(f"{database.display_url} is in use: name a new database")
        tariff.set_price(connection, tariff.TariffPrice(MODEL, "default", PRICE), now)
        tariff.set_price(connection, tariff.TariffPrice(MODEL, "batch", PRICE // 3), now)
        for index in range(number):
            if index % 5 == 0:
                account = people.open_account(connection, f"account {index}", now)
                amount = 20_000 if index % 20 == 0 else 10**12
                ledger.top_up(connection, account, amount, f"payment {index}", now)
            limit = KeySettings(spend_limit=10_000, spend_window="day") if index % 7 == 0 else KeySettings()
            made.append(keys.create(connection, peppers, account, limit, now))
    database.close()
    return made


def examine(url: str, seen: Seen, *, by_providers: bool = False) -> list[str]:
    """Return the errors in the books, from the answers that the callers got."""
    database = Database(url)
    with database.read() as connection:
        errors = [str(drift) for drift in verify(connection).drift]
        late = ledger.expired_holds(connection, now_ms() + ALL_TIME, limit=10**6)
    for charge in late:  # what the killed servers left behind is given back, and that too must add up
        with database.begin() as connection:
            ledger.expire(connection, charge, now_ms())
    if by_providers:
        errors += examine_costs(database, seen)
    with database.read() as connection:
        verification = verify(connection)
        errors += [str(drift) for drift in verification.drift]
        settled = {
            row.id: row.amount
            for row in connection.execute(sa.select(charges.c.id, charges.c.amount).where(charges.c.state == "settled"))
        }
        booked = Counter(connection.scalars(sa.select(entries.c.reference).where(entries.c.kind == "charge")))
        if connection.scalar(sa.select(sa.func.sum(accounts.c.held))):
            errors.append("something is held although everything ended")
        keys_used = connection.scalar(sa.select(sa.func.count()).select_from(replays))
    database.close()
    errors += [f"{charge} was answered twice" for charge in seen.twice]
    for charge, cost in seen.charged.items():
        if settled.get(charge) != cost or booked[charge] != 1:
            errors.append(f"{charge}: answered at {cost}, settled {settled.get(charge)}, booked {booked[charge]} times")
    errors += [f"{charge} was replayed and not settled" for charge in seen.replayed if charge not in settled]
    unseen = len(settled) - len(set(settled) & (set(seen.charged) | set(seen.replayed)))
    print(
        f"{verification.charges} charges, {len(settled)} settled, {unseen} of them with an answer that was lost "
        "on its way"
    )
    print(f"{len(late)} holds were left behind and given back")
    print(f"{keys_used} Idempotency-Keys, {sum(seen.replayed.values())} answers repeated")
    return errors


def examine_costs(database: Database, seen: Seen) -> list[str]:
    """Return the errors in what providers cost: attempts of answers that callers saw, and the books of all attempts."""
    open_costs = 0
    while True:
        with database.begin() as connection:
            if not (count := costs.book_costs(connection, now_ms())):
                break
        open_costs += count
    with database.read() as connection:
        attempts = connection.execute(sa.select(provider_attempts)).all()
        owed = costs.payables(connection)
    answered = Counter(row.charge for row in attempts if row.outcome == "answered" and row.charge is not None)
    errors = [
        f"{charge} has {answered[charge]} answers of providers" for charge in seen.charged if answered[charge] != 1
    ]
    for provider in {row.provider for row in attempts}:
        due = sum(row.cost for row in attempts if row.provider == provider)
        if owed.get(provider) != due:
            errors.append(f"{provider}: attempts cost {due}, the books owe {owed.get(provider)}")
    print(
        f"{len(attempts)} attempts at providers for {sum(owed.values())} nano-dollars, {open_costs} booked afterwards"
    )
    return errors


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=2000)
    options.add_argument("--keys", type=int, default=50)
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--database", help="URL of a new database; left out, SQLite in a temporary folder")
    options.add_argument("--providers", action="store_true", help="let two stubs of providers answer")
    options.add_argument("--seed", type=int, default=1)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.database or f"sqlite:///{folder}/accounts.sqlite"
        pepper = Path(folder) / "pepper"
        made = prepare(url, pepper, arguments.keys)
        subject = Subject(url, pepper, by_providers=arguments.providers)
        seen, left = Seen(), [arguments.requests]
        callers = [
            threading.Thread(target=caller, args=(key, subject, left, seen, arguments.seed * 1000 + index), daemon=True)
            for index, key in enumerate(made)
        ]
        began = time.perf_counter()
        for thread in callers:
            thread.start()
        chance = random.Random(arguments.seed)
        moments = sorted((chance.randrange(1, arguments.requests) for _ in range(arguments.kills)), reverse=True)
        for moment in moments:
            while left[0] > moment:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.02))
            subject.kill()
            subject.start()
        for thread in callers:
            thread.join()
        seconds = time.perf_counter() - began
        subject.stop()
        errors = examine(url, seen, by_providers=arguments.providers)
    times = np.array(seen.milliseconds or [0.0])
    print(
        f"{arguments.requests} requests of {arguments.keys} keys in {seconds:.0f} s, "
        f"{arguments.kills} kills: {dict(seen.statuses)}"
    )
    print(f"answered in {np.median(times):.1f} ms median, {np.percentile(times, 99):.1f} ms p99")
    for line in errors[:20]:
        print(f"WRONG {line}")
    print(f"WRONG: {len(errors)} findings" if errors else "zero drift, and every 200 was charged exactly once")
    return 1 if errors else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
