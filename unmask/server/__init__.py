"""Build a whole server from its settings, and run it."""

from unmask.server.process import serve

__all__ = ["serve"]
