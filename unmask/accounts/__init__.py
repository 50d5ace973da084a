"""People, keys, credit, limits and usage: the only package that touches money.

`Accounts` is the service of a server; its `membership` is the part for the people themselves. The modules `people`,
`keys`, `ledger`, `tariff`, `usage` and `audit` are plain functions of a connection, for the command line and the pages:
`Accounts.read` and `Accounts.write` run them.
"""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.accounts.accounts import Accounts, BillableRequest
    from unmask.accounts.keys import Caller
    from unmask.accounts.ledger import HeldCredit

__all__ = ["Accounts", "BillableRequest", "Caller", "HeldCredit"]

__getattr__ = lazy_exports(
    __name__,
    {
        "accounts": ("Accounts", "BillableRequest"),
        "keys": ("Caller",),
        "ledger": ("HeldCredit",),
    },
)
