"""The pages: what this server has, how good it is, and how to call it. Written on the server, read without a script."""

from unmask.web.account_hooks import Seams, WantIt
from unmask.web.rendering import page
from unmask.web.website import Website, website

__all__ = ["Seams", "WantIt", "Website", "page", "website"]
