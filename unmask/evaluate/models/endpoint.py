"""Peers behind an OpenAI-compatible `POST /embeddings`."""

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
from unmask.evaluate.models import Options

# OpenAI takes 2,048 inputs and 300,000 tokens in a request; smaller servers take less of both.
_BATCH = 64
_TRIES = 6
_TIMEOUT_S = 120.0


class EndpointModel:
    """A model behind an endpoint as a contender. See `unmask.evaluate.models.embedding_model.EmbeddingModel`.

    Nobody can know which weights answer, so its revision is the address, the model's name and the day.
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
        """float32 [n, dimensions], in batches, with retries when the server is busy or gone for a moment.

        Raises:
            EngineError: it refused, or kept failing.
        """
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            body: dict[str, Any] = {"model": self._model, "input": list(texts[start : start + _BATCH])}
            if instruction:
                body["instruction"] = instruction
            rows += self._vectors(self._post(body), len(body["input"]))
        return np.stack(rows) if rows else np.empty((0, self.dimensions), dtype=np.float32)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """None: the tokenizer is the server's."""
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
                wait = _seconds(answer.headers.get("retry-after"), wait)
            if attempt < _TRIES - 1:
                time.sleep(wait)
        raise EngineError(f"{self._client.base_url} does not give vectors of {self._model}: {problem}")

    def _vectors(self, answer: Any, count: int) -> list[np.ndarray]:
        try:
            ordered = sorted(answer["data"], key=lambda item: item["index"])
            vectors = [_numbers(item["embedding"]) for item in ordered]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._client.base_url} answers something else than embeddings: {error}") from error
        if len(vectors) != count:
            raise EngineError(f"{self._client.base_url} gave {len(vectors)} vectors for {count} texts")
        return vectors


def open_endpoint(options: Options) -> EndpointModel:
    """Reach an endpoint, `http://host/v1#model`. Its key is read from the variable that option `key` names.

    Raises:
        UsageError: no model is named, or the variable is not set.
        EngineError: it does not answer.
    """
    url, _, model = options.target.partition("#")
    if not model:
        raise UsageError(f"{url} names no model; write {url.rstrip('/')}#model")
    if urlsplit(url).username or urlsplit(url).password:
        raise UsageError("a key does not belong into the address; name the variable that holds it: ?key=VARIABLE")
    variable = options.one("key")
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if variable and not key:
        raise UsageError(f"?key={variable}: that environment variable is not set")
    return EndpointModel(
        url.rstrip("/") + "/",
        model,
        key,
        name=options.one("name") or f"{model} at {urlsplit(url).netloc}",
        takes_instructions=options.flag("instructions"),
    )


def _numbers(embedding: list[float] | str) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)


def _seconds(header: str | None, otherwise: float) -> float:
    """What Retry-After asks for, at most a minute; it may also be a date, which is not worth reading."""
    try:
        return min(60.0, float(header or ""))
    except ValueError:
        return otherwise
