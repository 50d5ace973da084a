"""HTTP in and out: OpenAI's embeddings API, its error envelope, health and counters."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.api.app import create_app
    from unmask.api.settings import ServeSettings

__all__ = ["ServeSettings", "create_app"]

__getattr__ = lazy_exports(
    __name__,
    {
        "app": ("create_app",),
        "settings": ("ServeSettings",),
    },
)
