"""`ask`: one request for vectors in the words of each kind of provider, and the answer checked in its form."""

import base64
import binascii
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from unmask.conformance import Answer
from unmask.router.providers import ProviderModel
from unmask.router.signals import AttemptFailed

if TYPE_CHECKING:
    from unmask.router.outbound import ProviderClient

# Of an answer: per number as Python's repr of a double writes it, per vector, and for the rest.
_BYTES_PER_NUMBER, _BYTES_PER_VECTOR, _BYTES_BESIDES = 26, 200, 65_536

# More tokens than any request has. Sums of larger counts would overflow a column of the database.
_MAX_COUNT = 2**31

_NAME_BYTES = 200  # of the model's name in an answer, to compare

_UNIT_LENGTH = 1e-2  # largest error of a length of 1, more than any rounding makes


class _Item(msgspec.Struct):
    embedding: str | list[float]
    index: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Envelope(msgspec.Struct):
    data: list[_Item]
    usage: _Usage | None = None
    model: msgspec.Raw = msgspec.Raw()  # as it came, whatever it is: an answer is not refused for it


_OPENAI = msgspec.json.Decoder(_Envelope)
_TEI = msgspec.json.Decoder(list[list[float]])


async def ask(
    client: "ProviderClient",
    model: ProviderModel,
    texts: Sequence[str],
    *,
    instruction: str = "",
    dim: int,
    seconds: float,
) -> Answer:
    """Send one request and return its vectors in the order of the texts.

    The vectors are as the provider gave them: their lengths and numbers are not checked, see `require_vectors`.

    Args:
        client: of the provider.
        model: the model there.
        texts: at most as many as the provider takes.
        instruction: for kinds that take one.
        dim: length of the model's vectors, which limits the size of the answer.
        seconds: for everything.

    Raises:
        AttemptFailed: there is no answer, or not one vector for each text.
    """
    kind, name = client.provider.kind, client.provider.name
    most = _BYTES_BESIDES + len(texts) * (dim * _BYTES_PER_NUMBER + _BYTES_PER_VECTOR)
    headers: dict[str, str] = {}
    if kind == "tei":
        path, body = "/embed", {"inputs": list(texts), "normalize": True, "truncate": False}
    else:
        path = "/embeddings"
        body = {"model": model.name_there, "input": list(texts), "encoding_format": "base64"}
    if kind == "unmask":
        headers["request-deadline-ms"] = str(max(1, int(seconds * 1000)))
        if instruction:
            body["instruction"] = instruction
    content = await client.post(path, msgspec.json.encode(body), seconds=seconds, max_bytes=most, headers=headers)
    try:
        if kind == "tei":
            rows = _TEI.decode(content.body)
            items, usage, model_name = [_Item(row, index) for index, row in enumerate(rows)], None, b""
        else:
            envelope = _OPENAI.decode(content.body)
            items, usage, model_name = envelope.data, envelope.usage, bytes(envelope.model)[:_NAME_BYTES]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise AttemptFailed(name, "malformed", f"{len(content.body)} bytes are no answer of the kind {kind}") from None
    if len(items) != len(texts):
        raise AttemptFailed(name, "malformed", f"{len(items)} vectors for {len(texts)} texts")
    ordered = _in_order(items)
    if ordered is None:
        raise AttemptFailed(name, "malformed", f"the indices of its vectors are not 0 to {len(texts) - 1}")
    try:
        raw = [base64.b64decode(item.embedding, validate=True) for item in ordered if isinstance(item.embedding, str)]
    except (binascii.Error, ValueError):
        raise AttemptFailed(name, "malformed", "a vector is no base64") from None
    if raw and len(raw) != len(ordered):
        raise AttemptFailed(name, "malformed", "some vectors are base64 and others are numbers")
    vectors = (
        [np.frombuffer(content[: len(content) // 4 * 4], dtype="<f4") for content in raw]
        if raw
        else [np.array(item.embedding, dtype=np.float32) for item in ordered]
    )
    origin = f"{content.server} {model_name.decode('utf-8', 'replace')}"
    return Answer(vectors, raw, _token_count(usage), origin)


def require_vectors(answer: Answer, dim: int, provider: str, *, has_unit_length: bool = False) -> np.ndarray:
    """Return the vectors of an answer, float32 [n, dim], of length 1.

    Args:
        answer: as the provider gave it.
        dim: length of the model's vectors.
        provider: its name.
        has_unit_length: its vectors have always come in length 1. Bytes in another order or format do not.

    Raises:
        AttemptFailed: a vector has another number of numbers, is zero or is not finite, or is suddenly not of length 1.
    """
    lengths = {len(vector) for vector in answer.vectors}
    if lengths != {dim}:
        raise AttemptFailed(provider, "malformed", f"vectors of {sorted(lengths)[:3]} numbers; the model's have {dim}")
    vectors = np.array(answer.vectors, dtype=np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))  # of float32, so no square overflows in float64
    least, most = float(norms.min()), float(norms.max())
    if not 0 < least <= most < math.inf:  # false for NaN as well
        raise AttemptFailed(provider, "malformed", "a vector is zero or not finite")
    if has_unit_length and not 1 - _UNIT_LENGTH <= least <= most <= 1 + _UNIT_LENGTH:
        raise AttemptFailed(provider, "malformed", "a vector is not of length 1, as all of them were so far")
    return (vectors / norms[:, None]).astype(np.float32)


def _token_count(usage: _Usage | None) -> int | None:
    """Return the provider's count of tokens; None where it gives none that can be."""
    count = usage.prompt_tokens if usage is not None else None
    return count if count is not None and 0 <= count <= _MAX_COUNT else None


def _in_order(items: Sequence[_Item]) -> list[_Item] | None:
    """Return the items by index; in their own order where none has an index; None if the indices are wrong."""
    indices = [item.index for item in items]
    if all(index is None for index in indices):
        return list(items)
    if sorted(index if index is not None else -1 for index in indices) != list(range(len(items))):
        return None
    return sorted(items, key=lambda item: item.index or 0)
