"""Models behind an OpenAI-compatible `POST /embeddings`.

A foreign server may send anything. Its answer is either one finite vector per text, in the texts' order and of the
length that the model has given before, or one `EngineError` that names the server and the fault.
"""

import base64
import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import numpy as np

from unmask.errors import EngineError, UsageError
from unmask.evaluate.models.specification import ModelSpecification
from unmask.tables import json_name

# OpenAI takes 2,048 inputs and 300,000 tokens in a request; smaller servers take less of both.
_BATCH = 64
_TRIES = 6
_TIMEOUT_S = 120.0
# Of a whole answer, so that a server that sends a byte a minute does not hold an evaluation for ever.
_ANSWER_S = 600.0
# 64 vectors of 65,536 numbers as JSON are 100 MB.
_MAX_ANSWER_BYTES = 256 * 2**20


class EndpointModel:
    """A model behind an endpoint as an `EmbeddingModel`.

    Nobody outside can know which weights answer, so the revision is made of the address, the model's name and the day.
    """

    kind: Literal["endpoint"] = "endpoint"
    parameters: int | None = None

    def __init__(self, url: str, model: str, key: str | None, *, name: str, takes_instructions: bool) -> None:
        self.name, self.takes_instructions = name, takes_instructions
        self._model = model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)
        except (httpx.InvalidURL, ValueError) as error:
            # The message of an encoding error holds the key.
            problem = "its key has characters that no header holds" if isinstance(error, UnicodeError) else error
            raise UsageError(f"{url} cannot be called: {problem}") from None
        self.dimensions = 0  # not known before the first answer
        self.dimensions = int(self.encode(["The length of this vector is asked for."]).shape[1])
        day = datetime.now(UTC).date().isoformat()
        self.revision = f"{hashlib.sha256(f'{url} {model}'.encode()).hexdigest()[:16]}-as-of-{day}"

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions], in batches, with retries while the server is busy or unreachable.

        Raises:
            EngineError: the server refused, still failed after the last retry, or sent something else than one vector
                per text.
        """
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            body: dict[str, Any] = {"model": self._model, "input": list(texts[start : start + _BATCH])}
            if instruction:
                body["instruction"] = instruction
            rows += self._vectors(self._post(body), len(body["input"]))
        return np.stack(rows) if rows else np.empty((0, self.dimensions), dtype=np.float32)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Return None: the tokenizer is on the server."""
        return None

    def close(self) -> None:
        """Close the connections to the server."""
        self._client.close()

    def _post(self, body: dict[str, Any]) -> Any:
        problem = ""
        for attempt in range(_TRIES):
            wait = min(30.0, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                status, headers, content = self._answer({**body, "encoding_format": "base64"})
            except httpx.RequestError as error:
                problem = _one_line(f"{type(error).__name__}: {error}")
            else:
                if 200 <= status < 300:
                    return self._parsed(content)
                place = f" (to {headers['location']})" if 300 <= status < 400 and "location" in headers else ""
                problem = _one_line(f"HTTP {status}{place}: {content.decode('utf-8', 'replace')}")
                if status not in (408, 409, 425, 429) and status < 500:
                    break
                wait = _retry_after(headers.get("retry-after"), wait)
            if attempt < _TRIES - 1:
                time.sleep(wait)
        raise EngineError(f"{self._client.base_url} does not give vectors of {self._model}: {problem}")

    def _answer(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Post once and read the answer, up to a number of bytes and seconds."""
        ends = time.monotonic() + _ANSWER_S
        content = bytearray()
        # A redirect is not followed: the key is for this server only.
        with self._client.stream("POST", "embeddings", json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > _MAX_ANSWER_BYTES:
                    raise self._fault(f"more than {_MAX_ANSWER_BYTES // 2**20} MiB")
                if time.monotonic() > ends:
                    raise self._fault(f"an answer that has not ended after {_ANSWER_S:.0f} s")
            return response.status_code, response.headers, bytes(content)

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            beginning = _one_line(content[:400].decode("utf-8", "replace"))
            raise self._fault(f"no JSON: {beginning or '(nothing)'}") from error

    def _vectors(self, answer: Any, count: int) -> list[np.ndarray]:
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise self._fault(f"no list of vectors: {_one_line(json.dumps(answer))}")
        items = answer["data"]
        if len(items) != count:
            raise self._fault(f"{len(items)} vectors for {count} texts")
        vectors: dict[int, np.ndarray] = {}
        for item in items:
            index = item.get("index") if isinstance(item, dict) else None
            if type(index) is not int or index not in range(count) or index in vectors:
                raise self._fault(f"vectors whose index is not each of 0 to {count - 1} once: {_one_line(str(index))}")
            try:
                vectors[index] = _decode_vector(item.get("embedding"))
            except ValueError as error:
                raise self._fault(f"no vector for text {index + 1} of {count}: {error}") from error
            # All vectors of a model have one length.
            expected = self.dimensions or len(next(iter(vectors.values())))
            if len(vectors[index]) != expected:
                raise self._fault(f"vectors of {len(vectors[index])} and of {expected} numbers")
        return [vectors[index] for index in range(count)]

    def _fault(self, problem: str) -> EngineError:
        return EngineError(f"{self._client.base_url} gave {problem}; {self._model} cannot be measured there")


def open_endpoint(specification: ModelSpecification) -> EndpointModel:
    """Connect to an endpoint, `http://host/v1#model`. Option `key` names the environment variable with its key.

    Raises:
        UsageError: no model is named, or the variable is not set.
        EngineError: the endpoint does not answer.
    """
    url, _, model = specification.target.partition("#")
    if not model:
        raise UsageError(f"{url} names no model; write {url.rstrip('/')}#model")
    if urlsplit(url).username or urlsplit(url).password:
        raise UsageError("a key does not belong into the address; name the variable that holds it: ?key=VARIABLE")
    variable = specification.one("key")
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if variable and not key:
        raise UsageError(f"?key={variable}: that environment variable is not set")
    return EndpointModel(
        url.rstrip("/") + "/",
        model,
        key,
        name=specification.one("name") or f"{model} at {urlsplit(url).netloc}",
        takes_instructions=specification.flag("instructions"),
    )


def _decode_vector(embedding: Any) -> np.ndarray:
    """Return float32 [dimensions] from a list of numbers or from base64.

    Raises:
        ValueError: it is neither, or has no direction: no number, one that is not finite, or zeros only.
    """
    if isinstance(embedding, str):
        vector = np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    elif isinstance(embedding, list) and all(type(value) in (int, float) for value in embedding):
        try:
            with np.errstate(over="ignore"):  # a number beyond float32 is refused below
                vector = np.array(embedding, dtype=np.float64).astype(np.float32)
        except OverflowError as error:
            raise ValueError("a number that is not finite") from error
    elif isinstance(embedding, list):
        raise ValueError("a list that holds something else than numbers")
    else:
        raise ValueError(f"{json_name(embedding)} found where a list of numbers or base64 is needed")
    if not len(vector):
        raise ValueError("it has no numbers")
    if not np.isfinite(vector).all():
        raise ValueError("a number that is not finite")
    if not vector.any():
        raise ValueError("all its numbers are 0")
    return vector


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds of a Retry-After header, at most a minute; `default` if it is absent or no such number."""
    try:
        seconds = float(header or "")
    except ValueError:
        return default
    return min(60.0, seconds) if seconds >= 0 else default


def _one_line(text: str, length: int = 200) -> str:
    """Return the beginning of a foreign text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * length]).split())[:length]
