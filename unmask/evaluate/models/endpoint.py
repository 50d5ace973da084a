"""Models behind an OpenAI-compatible `POST /embeddings`."""

import base64
import hashlib
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

# OpenAI takes 2,048 inputs and 300,000 tokens in a request; smaller servers take less of both.
_BATCH = 64
_TRIES = 6
_TIMEOUT_S = 120.0


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
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)
        self.dimensions = int(self.encode(["The length of this vector is asked for."]).shape[1])
        day = datetime.now(UTC).date().isoformat()
        self.revision = f"{hashlib.sha256(f'{url} {model}'.encode()).hexdigest()[:16]}-as-of-{day}"

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions], in batches, with retries while the server is busy or unreachable.

        Raises:
            EngineError: the server refused, or still failed after the last retry.
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

    def _post(self, body: dict[str, Any]) -> Any:
        problem = ""
        for attempt in range(_TRIES):
            wait = min(30.0, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                answer = self._client.post("embeddings", json={**body, "encoding_format": "base64"})
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    return answer.json()
                problem = f"HTTP {answer.status_code}: {answer.text[:200]}"
                if answer.status_code not in (408, 409, 425, 429) and answer.status_code < 500:
                    break
                wait = _retry_after(answer.headers.get("retry-after"), wait)
            if attempt < _TRIES - 1:
                time.sleep(wait)
        raise EngineError(f"{self._client.base_url} does not give vectors of {self._model}: {problem}")

    def _vectors(self, answer: Any, count: int) -> list[np.ndarray]:
        try:
            ordered = sorted(answer["data"], key=lambda item: item["index"])
            vectors = [_decode_vector(item["embedding"]) for item in ordered]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._client.base_url} answers something else than embeddings: {error}") from error
        if len(vectors) != count:
            raise EngineError(f"{self._client.base_url} gave {len(vectors)} vectors for {count} texts")
        return vectors


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


def _decode_vector(embedding: list[float] | str) -> np.ndarray:
    """Return float32 [dimensions] from a list of numbers or from base64."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds of a Retry-After header, at most a minute; `default` if it is absent or a date."""
    try:
        return min(60.0, float(header or ""))
    except ValueError:
        return default
