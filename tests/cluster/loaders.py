"""Models as the workers of a test load them: slow, deadly, or of another version. Each function runs in the worker."""

import hashlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.storage import Store
from unmask.cluster import bulk
from unmask.cluster.bulk import cluster_executor
from unmask.cluster.options import ClusterOptions
from unmask.encoder.encoder import Encoder
from unmask.encoder.prompts import Prompt


def slow(model: Path, seconds: float) -> Encoder:
    """An encoder that waits before each call of its forward."""
    encoder = Encoder.load(model)
    encode = encoder.encode_prompts

    def encode_prompts(prompts: list[Prompt]) -> np.ndarray:
        time.sleep(seconds)
        return encode(prompts)

    encoder.encode_prompts = encode_prompts  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def dying_at(model: Path, deaths: dict[str, str], folder: Path) -> Encoder:
    """An encoder whose process is killed at the commits of some units, once at each.

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
        os.kill(os.getpid(), signal.SIGKILL)

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


def digests(folder: Path) -> dict[str, str]:
    """Names and digests of the parts in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("part-*"))}


if __name__ == "__main__":
    source, output, model_folder, address = sys.argv[1:]
    encoder_loader = partial(slow, Path(model_folder), 0.5)
    options = ClusterOptions(cluster=address, workers="2")
    run(EncodeJob((source,), output), encoder_loader, open_executor=partial(cluster_executor, options))
