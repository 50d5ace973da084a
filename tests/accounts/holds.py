"""A hold like any other, for tests that look at what becomes of it."""

from unmask.accounts.ledger import Hold


def small_hold(account: str, id: str = "chg_1", key: str | None = None) -> Hold:
    """Return a hold of 24 nano-dollars for three tokens, which expires at 10."""
    return Hold(
        id=id,
        account_id=account,
        key_id=key,
        request="r",
        model="m",
        tier="default",
        tokens=3,
        amount=24,
        expires_at=10,
    )
