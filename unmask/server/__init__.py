"""Build the whole server from its settings and run it: models, accounts, API and pages."""

from unmask.server.http_server import serve

__all__ = ["serve"]
