"""Audited actions: each function makes one change and appends its audit row, in the caller's transaction.

The pages, the API and the command line make changes through this module only; a test holds them to it. The functions
of `people`, `keys`, `ledger` and `tariff` that change tables are the steps that actions consist of.
"""

from sqlalchemy import Connection

from unmask.accounts import audit, keys, ledger, people, tariff, usage
from unmask.accounts.audit import Actor
from unmask.accounts.identity_provider import Identity
from unmask.accounts.keys import KeySettings, Peppers
from unmask.accounts.people import Person
from unmask.accounts.tariff import RatePlan, TariffPrice
from unmask.errors import LedgerRefused, SignInRefused
from unmask.storage.schema import DEFAULT_PLAN


def create_account(
    connection: Connection,
    actor: Actor,
    peppers: Peppers,
    name: str,
    now: int,
    *,
    email: str | None = None,
    password_hash: str = "",
    admin: bool = False,
    plan: str = DEFAULT_PLAN,
) -> str:
    """Create an account, with `email` also a person who can sign in to it. Returns the account's id.

    Args:
        name: of the account; with `email` the address is its name instead.
        password_hash: from `people.hash_password`.

    Raises:
        UsageError: the name, the address or the plan is wrong.
        AddressTaken: the address is taken.
    """
    if email is not None:
        account = people.sign_up(connection, peppers, email, password_hash, now, admin=admin).account_id
    else:
        account = people.open_account(connection, name, now)
    if plan != DEFAULT_PLAN:
        tariff.assign_plan(connection, account, plan)
    audit.append(connection, actor, "account.create", account, now, plan=plan, admin=admin)
    return account


def set_account_frozen(connection: Connection, actor: Actor, account: str, now: int, *, frozen: bool) -> bool:
    """Freeze an account, or thaw it. Returns False, without an audit row, if it was so before.

    Raises:
        UsageError: there is no such account.
    """
    changed = people.set_frozen(connection, account, frozen=frozen)
    if changed:
        audit.append(connection, actor, "account.freeze" if frozen else "account.thaw", account, now)
    return changed


def close_account(connection: Connection, actor: Actor, account: str, now: int) -> int:
    """Delete an account, see `people.close_account`. Returns the nano-dollars that are forfeited.

    The audit row has no IP address: nothing identifies the owner of a closed account.

    Raises:
        LedgerRefused: requests of it are in flight.
    """
    forfeited = people.close_account(connection, account, now)
    audit.append(connection, Actor(actor.id), "account.close", account, now, given_up_nano=forfeited)
    return forfeited


def create_key(
    connection: Connection, actor: Actor, peppers: Peppers, account: str, settings: KeySettings, now: int
) -> str:
    """Create an API key and return it whole, see `keys.create`."""
    key = keys.create(connection, peppers, account, settings, now)
    audit.append(connection, actor, "key.create", account, now, key=keys.key_id(key))
    return key


def change_key(
    connection: Connection, actor: Actor, account: str, key_id: str, settings: KeySettings, now: int
) -> None:
    """Replace a key's settings, see `keys.change`."""
    keys.change(connection, account, key_id, settings, now)
    audit.append(connection, actor, "key.change", account, now, key=key_id)


def rotate_key(
    connection: Connection, actor: Actor, peppers: Peppers, account: str, key_id: str, now: int, *, overlap_ms: int
) -> str:
    """Create a key that replaces another, and return it whole, see `keys.rotate`."""
    key = keys.rotate(connection, peppers, account, key_id, now, overlap_ms=overlap_ms)
    audit.append(connection, actor, "key.rotate", account, now, key=key_id, by=keys.key_id(key))
    return key


def revoke_key(connection: Connection, actor: Actor, account: str, key_id: str, now: int) -> bool:
    """Revoke a key, see `keys.revoke`. Returns False, without an audit row, if it was revoked before."""
    revoked = keys.revoke(connection, account, key_id, now)
    if revoked:
        audit.append(connection, actor, "key.revoke", account, now, key=key_id)
    return revoked


def top_up(
    connection: Connection,
    actor: Actor,
    account: str,
    amount: int,
    reference: str,
    now: int,
    *,
    note: str = "",
    gift: bool = False,
) -> bool:
    """Add credit once per reference, see `ledger.top_up`.

    Args:
        amount: nano-dollars.
        gift: nobody paid for it.

    Returns:
        False, without an audit row, if this very top-up is in the books already.
    """
    source = ledger.PROMOTION if gift else ledger.CASH
    booked = ledger.top_up(connection, account, amount, reference, now, note=note, source=source)
    if booked:
        detail = {"nano": amount, "reference": reference, "gift": gift}
        audit.append(connection, actor, "credit.top_up", account, now, **detail)
    return booked


def pay_out(
    connection: Connection, actor: Actor, account: str, amount: int, reference: str, now: int, *, note: str = ""
) -> None:
    """Take out credit that was paid back to its owner, see `ledger.pay_out`."""
    ledger.pay_out(connection, account, amount, reference, now, note=note)
    audit.append(connection, actor, "credit.pay_out", account, now, nano=amount, reference=reference)


def refund(
    connection: Connection, actor: Actor, charge: str, now: int, *, note: str = "", account: str | None = None
) -> bool:
    """Give back the cost of a settled charge, once, see `ledger.refund`.

    Args:
        account: where given, the charge must belong to it and the audit row is about it, else about the charge.

    Returns:
        False, without an audit row, if the charge was refunded before or cost nothing.

    Raises:
        LedgerRefused: it is not settled, is another account's, or its account is closed.
    """
    if account is not None and usage.account_of_charge(connection, charge) != account:
        raise LedgerRefused(f"there is no charge {charge[:60]!r} of this account")
    refunded = ledger.refund(connection, charge, now, note=note)
    if refunded:
        detail = {} if account is None else {"charge": charge}
        audit.append(connection, actor, "credit.refund", account or charge, now, **detail)
    return refunded


def set_price(connection: Connection, actor: Actor, price: TariffPrice, now: int) -> None:
    """Set or change a price, see `tariff.set_price`."""
    tariff.set_price(connection, price, now)
    detail = {"tier": price.tier, "nano_per_million": price.nano_per_million}
    audit.append(connection, actor, "price.set", price.model, now, **detail)


def set_proposed_price(connection: Connection, actor: Actor, model: str, nano_per_million: int, now: int) -> None:
    """Charge the price that onboarding proposed for a model, in the default tier. Its audit row names no tier."""
    tariff.set_price(connection, TariffPrice(model, "default", nano_per_million), now)
    audit.append(connection, actor, "price.set", model, now, nano_per_million=nano_per_million)


def remove_price(connection: Connection, actor: Actor, model: str, tier: str, now: int) -> bool:
    """Remove a price. Returns False, without an audit row, if there was none."""
    removed = tariff.remove_price(connection, model, tier)
    if removed:
        audit.append(connection, actor, "price.remove", model, now, tier=tier)
    return removed


def set_plan(connection: Connection, actor: Actor, plan: RatePlan, now: int) -> None:
    """Create or change a plan, see `tariff.set_plan`."""
    tariff.set_plan(connection, plan)
    limits = {"requests_per_minute": plan.requests_per_minute, "tokens_per_minute": plan.tokens_per_minute}
    audit.append(connection, actor, "plan.set", plan.name, now, limits=limits)


def assign_plan(connection: Connection, actor: Actor, account: str, plan: str, now: int) -> None:
    """Put an account on a plan, see `tariff.assign_plan`."""
    tariff.assign_plan(connection, account, plan)
    audit.append(connection, actor, "plan.assign", account, now, plan=plan)


def sign_up(
    connection: Connection,
    address: str,
    peppers: Peppers,
    email: str,
    password_hash: str,
    now: int,
    *,
    free_credit: int = 0,
    invitation: str | None = None,
    issuer: str | None = None,
) -> Person:
    """Create a person with an account of their own, who is the actor of it.

    Args:
        address: IP address of the request.
        password_hash: from `people.hash_password`, or `people.NO_PASSWORD`.
        free_credit: nano-dollars.
        invitation: token of the first admin, which is used up.
        issuer: of the identity that the person signs up with, for the audit row.

    Raises:
        UsageError, AddressTaken: as `people.sign_up`.
        SignInRefused: the invitation is invalid.
    """
    admin = invitation is not None
    if invitation is not None:
        people.accept_invitation(connection, invitation, now)
    person = people.sign_up(connection, peppers, email, password_hash, now, free_credit=free_credit, admin=admin)
    detail = {} if issuer is None else {"issuer": issuer}
    audit.append(connection, Actor(person.id, address), "person.sign_up", person.account_id, now, **detail)
    return person


def sign_in(
    connection: Connection, actor: Actor, now: int, *, credentials: tuple[str, str] | None = None, issuer: str = ""
) -> str:
    """Sign the actor in. Returns the token for the cookie.

    Args:
        credentials: mail address and the stored hash that the password was checked against, for a sign-in with a
            password. Checked again here: the password may have been changed since.
        issuer: of the identity, for a sign-in without a password.

    Raises:
        SignInRefused: the stored hash is not the one that was checked.
    """
    if credentials is not None:
        email, stored_hash = credentials
        if people.stored_password(connection, email) != (actor.id, stored_hash):
            raise SignInRefused("this address and this password do not fit")
    detail = {"issuer": issuer} if issuer else {}
    audit.append(connection, actor, "person.sign_in", actor.id, now, **detail)
    return people.create_session(connection, actor.id, now)


def sign_out(connection: Connection, actor: Actor, token: str, now: int) -> None:
    """Sign the actor out of one session."""
    people.delete_session(connection, token)
    audit.append(connection, actor, "person.sign_out", actor.id, now)


def link_identity(connection: Connection, actor: Actor, identity: Identity, now: int) -> None:
    """Let the actor sign in with an identity as well, see `people.add_identity`."""
    people.add_identity(connection, actor.id, identity, now)
    audit.append(connection, actor, "person.link", actor.id, now, issuer=identity.issuer)


def unlink_identity(connection: Connection, actor: Actor, issuer: str, now: int) -> None:
    """End the actor's sign-ins with an issuer, and all their sessions, see `people.remove_identity`."""
    people.remove_identity(connection, actor.id, issuer)
    audit.append(connection, actor, "person.unlink", actor.id, now, issuer=issuer)


def set_password(connection: Connection, actor: Actor, password_hash: str, now: int) -> None:
    """Set the actor's password, which ends all their sessions."""
    people.set_password(connection, actor.id, password_hash)
    audit.append(connection, actor, "person.password", actor.id, now)
