"""Build a whole server from its settings, and run it."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.server.process import serve

__all__ = ["serve"]

__getattr__ = lazy_exports(
    __name__,
    {
        "process": ("serve",),
    },
)
