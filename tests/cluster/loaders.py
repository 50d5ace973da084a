"""Models as the workers of a test load them: slow, deadly, or of another version. Each function runs in the worker."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from unmask.bulk import storage
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.report import EncodeProgress
from unmask.bulk.storage import Store
from unmask.bulk.units import JOB_FILE
from unmask.cluster import bulk, pool, replicas
from unmask.cluster.bulk import cluster_executor
from unmask.cluster.connection import import_ray
from unmask.cluster.options import ClusterOptions
from unmask.encoder.encoder import Encoder
from unmask.encoder.prompts import Prompt
from unmask.engine.hand import LocalHand
from unmask.errors import UnmaskError


def slow(model: Path, seconds: float) -> Encoder:
    """An encoder that waits before each call of its forward."""
    encoder = Encoder.load(model)
    encode = encoder.encode_prompts

    def encode_prompts(prompts: list[Prompt]) -> np.ndarray:
        time.sleep(seconds)
        return encode(prompts)

    encoder.encode_prompts = encode_prompts  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def held(model: Path, folder: Path, pack_tokens: int) -> Encoder:
    """An encoder of a replica, whose packs wait while a folder has a file `closed`."""
    encoder = Encoder.load(model, dtype="float32")
    forward = encoder.forward_pack

    def forward_pack(prompts: Sequence[Prompt]) -> np.ndarray:
        while (folder / "closed").exists():
            time.sleep(0.01)
        return forward(prompts)

    encoder.forward_pack = forward_pack  # pyright: ignore[reportAttributeAccessIssue]
    replicas.LocalHand = partial(LocalHand, pack_tokens=pack_tokens)  # pyright: ignore[reportPrivateImportUsage]
    return encoder


def slow_together(model: Path, seconds: float, folder: Path) -> Encoder:
    """An encoder as `slow`, which is loaded when another process has loaded one too."""
    encoder = slow(model, seconds)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.05)
    return encoder


def dying_at(model: Path, deaths: dict[str, str], folder: Path, end: signal.Signals = signal.SIGKILL) -> Encoder:
    """An encoder whose process is killed at the commits of some units, once at each, or stopped by another signal.

    Args:
        deaths: "before the part", "after the part" or "after the manifest", by unit.
        folder: of a file per death, so that each comes once.
    """
    put = Store.put

    def deadly(store: Store, name: str, content: bytes) -> None:
        unit = Path(name).stem.removeprefix("part-")
        point, is_part = deaths.get(unit), name.startswith("part-")
        if is_part and point == "before the part":
            die(unit)
        put(store, name, content)
        if point == ("after the part" if is_part else "after the manifest"):
            die(unit)

    def die(unit: str) -> None:
        try:
            (folder / unit).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), end)

    Store.put = deadly  # pyright: ignore[reportAttributeAccessIssue]
    return Encoder.load(model)


def dying_of(model: Path, word: str) -> Encoder:
    """An encoder whose process is killed by every text that holds a word."""
    encoder = Encoder.load(model)
    build = encoder.prompts.build

    def deadly(texts: list[str], *arguments: object) -> list[Prompt]:
        if any(word in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return build(texts, *arguments)  # pyright: ignore[reportArgumentType]

    encoder.prompts.build = deadly  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def of_another_version(model: Path) -> Encoder:
    """An encoder in a process with another torch."""
    versions = bulk.package_versions()
    bulk.package_versions = lambda: versions | {"torch": "0.1"}  # pyright: ignore[reportPrivateImportUsage]
    return Encoder.load(model)


def of_a_store(model: Path) -> Encoder:
    """An encoder in a process that writes to a server which knows no checksums of newer SDKs, and tries again soon."""
    os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
    storage._PAUSES = (0.0,) * 4
    return Encoder.load(model)


def digests(folder: Path) -> dict[str, str]:
    """Names and digests of the parts in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("part-*"))}


def drive(job: EncodeJob, model: Path, address: str, death: str) -> None:
    """Encode slowly by two workers, as a process that is killed at a moment; "" for none."""

    def encoding(state: EncodeProgress) -> None:
        if state.tokens and death == "while encoding":
            os.kill(os.getpid(), signal.SIGKILL)

    put = Store.put

    def deadly(store: Store, name: str, content: bytes) -> None:
        if death == "before the end" and name.endswith("done.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        put(store, name, content)
        if death == "after the job" and name == JOB_FILE:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.put = deadly  # pyright: ignore[reportAttributeAccessIssue]
    pool._HEAD_ASK_S, pool._HEAD_S = 0.2, 0.5
    options = ClusterOptions(cluster=address, workers="2")
    try:
        run(job, partial(slow, model, 0.5), encoding, partial(cluster_executor, options))
    except UnmaskError as error:
        sys.exit(f"unmask: {error}")


if __name__ == "__main__":
    source, output, model_folder, address, *moments = sys.argv[1:]
    arguments = EncodeJob((source,), output), Path(model_folder), address
    import_ray()
    for moment in moments:  # processes that have all imported, one after the other
        child = os.fork()
        if child == 0:
            drive(*arguments, moment)
            sys.exit("it lived too long")
        sys.stdout.write(f"{moment} {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
    if not moments:
        drive(*arguments, "")
