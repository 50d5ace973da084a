"""The pages for people: catalogue, accounts and administration. Rendered on the server; they work without a script."""

from unmask.web.account_hooks import AccountHooks, VoteButton
from unmask.web.site import Site
from unmask.web.website import build_pages, website

__all__ = ["AccountHooks", "Site", "VoteButton", "build_pages", "website"]
