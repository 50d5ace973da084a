"""The record of a model, and where records come from: TOML files that ship, or the model's own files."""

import base64
import time
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text whose vector is known: a server that gives another one must not answer.

    `vector` is the normalised default-mode vector, little-endian float16, base64.
    """

    text: str
    vector: str

    def expected(self) -> np.ndarray:
        """The vector as float32 [dim]."""
        return np.frombuffer(base64.b64decode(self.vector), dtype="<f2").astype(np.float32)


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a model. None means not known; nothing here is guessed.

    Attributes:
        id, aliases: names a request may use. One of them contains "embed", which some clients filter by.
        parameters: of the decoder, embedding included.
        max_tokens: longest sequence, everything counted.
        trained: False if the weights are a decoder's own, with no embedding training.
        created: Unix seconds.
        revision: content address of the weights, known once they are loaded.
    """

    id: str
    aliases: tuple[str, ...] = ()
    name: str = ""
    summary: str = ""
    task: str = "embeddings"
    architecture: str | None = None
    base: str | None = None
    parameters: int | None = None
    dimensions: int | None = None
    matryoshka: tuple[int, ...] = ()
    max_tokens: int | None = None
    pooling: str | None = None
    query_instruction: str = ""
    document_instruction: str = ""
    licence: str | None = None
    trained: bool | None = None
    notes: tuple[str, ...] = ()
    created: int = 0
    owned_by: str = ""
    revision: str | None = None
    canary: Canary | None = None


@cache
def shipped_records() -> dict[str, Record]:
    """Records that come with the package, by id."""
    folder = files("unmask.catalogue").joinpath("records")
    records = [
        msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), Record)
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    ]
    return {record.id: _with_embed_alias(record) for record in records}


def record_for(name: str) -> Record:
    """The record of a model named on the command line: shipped, or as much as its name says.

    A local path is known to clients by its last part, so that no directory of this machine shows in a response.
    """
    shipped = shipped_records().get(name)
    if shipped is not None:
        return shipped
    path = Path(name).expanduser()
    identity = path.name.removesuffix(".gguf") if path.exists() else name
    owner = name.split("/", maxsplit=1)[0] if identity == name and "/" in name else "local"
    return _with_embed_alias(Record(id=identity, name=identity, created=int(time.time()), owned_by=owner))


def _with_embed_alias(record: Record) -> Record:
    if any("embed" in known.lower() for known in (record.id, *record.aliases)):
        return record
    return msgspec.structs.replace(record, aliases=(*record.aliases, f"{record.id}-embed"))
