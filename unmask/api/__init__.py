"""HTTP in and out: OpenAI's embeddings API, its error envelope, health and counters."""

from unmask.api.app import create_app
from unmask.api.settings import ServeSettings

__all__ = ["ServeSettings", "create_app"]
