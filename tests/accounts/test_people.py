"""Signing up and in, the free credit, and being forgotten."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from unmask.accounts import Accounts, audit, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings
from unmask.accounts.ledger import Hold
from unmask.accounts.limits import LocalLimiter
from unmask.accounts.verification import verify
from unmask.errors import AccountError, AddressTaken, Forbidden, LedgerRefused, RateLimited, SignInRefused, UsageError
from unmask.storage.database import now_ms

PASSWORD = "correct horse battery"
FREE = 1_000_000_000


def do(accounts: Accounts, piece):
    with accounts.database.begin() as connection:
        return piece(connection)


async def test_sign_up_and_in(accounts: Accounts):
    person = await accounts.membership.sign_up(" Ada@Example.org ", PASSWORD, address="10.0.0.1")
    assert (person.email, person.admin) == ("ada@example.org", False)
    token = await accounts.membership.sign_in("ada@example.org", PASSWORD, address="10.0.0.1")
    assert do(accounts, lambda c: people.person_of_session(c, token, now_ms())) == person
    with pytest.raises(SignInRefused):
        do(accounts, lambda c: people.person_of_session(c, token, now_ms() + people.SESSION_MS + 1000))
    do(accounts, lambda c: people.delete_session(c, token))
    with pytest.raises(SignInRefused):
        do(accounts, lambda c: people.person_of_session(c, token, now_ms()))


async def test_nothing_secret_is_stored(
    accounts: Accounts, real_hasher: Callable[[], PasswordHasher], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(people, "_hasher", real_hasher)
    await accounts.membership.sign_up("ada@example.org", PASSWORD, address="")
    token = await accounts.membership.sign_in("ada@example.org", PASSWORD, address="")
    for table in ("people", "sessions", "audit"):
        rows = str(do(accounts, lambda c, table=table: c.exec_driver_sql(f"SELECT * FROM {table}").all()))
        assert PASSWORD not in rows and token not in rows
    hashed = do(accounts, lambda c: people.stored_password(c, "ada@example.org"))
    assert hashed and hashed[1].startswith("$argon2id$v=19$m=65536,t=3,p=1$")


async def test_a_wrong_password_and_an_unknown_address_are_one_answer(accounts: Accounts):
    await accounts.membership.sign_up("ada@example.org", PASSWORD, address="")
    words = set()
    for email, password in (("ada@example.org", "wrong password"), ("bob@example.org", PASSWORD), ("no mail", "x")):
        with pytest.raises(SignInRefused) as refused:
            await accounts.membership.sign_in(email, password, address="")
        words.add(str(refused.value))
    assert len(words) == 1


async def test_tries_are_limited_by_address_and_by_place(url: str, tmp_path: Path):
    # Its clock stands still: on a busy machine the tries would come more slowly than they are forgotten.
    accounts = Accounts(url, pepper=tmp_path / "pepper", limiter=LocalLimiter(lambda: 0.0))
    try:
        for _ in range(10):
            with pytest.raises(SignInRefused):
                await accounts.membership.sign_in("ada@example.org", "wrong password", address="10.0.0.1")
        with pytest.raises(RateLimited, match="wait"):
            await accounts.membership.sign_in("ADA@example.org", "wrong password", address="10.0.0.2")
        with pytest.raises(SignInRefused):
            await accounts.membership.sign_in("bob@example.org", "wrong password", address="10.0.0.2")
    finally:
        accounts.close()


async def test_an_ipv6_network_is_one_place(tmp_path: Path):
    limiter = LocalLimiter(lambda: 0.0)
    accounts = Accounts(f"sqlite:///{tmp_path / 'a.sqlite'}", pepper=tmp_path / "pepper", limiter=limiter)
    try:
        for number in range(30):
            await accounts.membership.throttle_address(f"2001:db8:1:2::{number:x}")
            await accounts.membership.throttle_address(("198.51.100.7", "::ffff:198.51.100.7")[number % 2])
        for address in ("2001:db8:1:2:ffff::9", "2001:db8:1:2::1%eth0", "198.51.100.7", "::ffff:c633:6407"):
            with pytest.raises(RateLimited):
                await accounts.membership.throttle_address(address)
        for address in ("2001:db8:1:3::1", "::ffff:198.51.100.8", "198.51.100.9", "::1", ""):
            await accounts.membership.throttle_address(address)
    finally:
        accounts.close()


async def test_free_credit_comes_once_per_address_for_ever(accounts: Accounts):
    person = await accounts.membership.sign_up("ada@example.org", PASSWORD, address="")
    assert do(accounts, lambda c: people.account(c, person.account_id)).balance == FREE
    assert do(accounts, lambda c: people.close_account(c, person.account_id, now_ms())) == FREE
    again = await accounts.membership.sign_up("ADA@example.org", PASSWORD, address="")
    assert again.account_id != person.account_id
    assert do(accounts, lambda c: people.account(c, again.account_id)).balance == 0
    assert do(accounts, verify).drift == ()


async def test_an_address_is_used_once(accounts: Accounts):
    await accounts.membership.sign_up("ada@example.org", PASSWORD, address="")
    with pytest.raises(AccountError, match="sign in instead"):
        await accounts.membership.sign_up("Ada@example.org", PASSWORD, address="")
    assert len(do(accounts, people.all_accounts)) == 1


@pytest.mark.parametrize("email", ["", "ada", "a@b", "two words@example.org", "a@b@c.org", "x" * 300 + "@e.org"])
async def test_what_is_no_address(accounts: Accounts, email: str):
    with pytest.raises(UsageError, match="mail address"):
        await accounts.membership.sign_up(email, PASSWORD, address="")


@pytest.mark.parametrize("password", ["", "short", "x" * 1001])
async def test_what_is_no_password(accounts: Accounts, password: str):
    with pytest.raises(UsageError, match="password"):
        await accounts.membership.sign_up("ada@example.org", password, address="")


async def test_another_password_ends_every_session(accounts: Accounts):
    person = await accounts.membership.sign_up("ada@example.org", PASSWORD, address="")
    token = await accounts.membership.sign_in("ada@example.org", PASSWORD, address="")
    with pytest.raises(SignInRefused):
        await accounts.membership.change_password(person, "wrong password", "another password", address="")
    await accounts.membership.change_password(person, PASSWORD, "another password", address="")
    with pytest.raises(SignInRefused):
        do(accounts, lambda c: people.person_of_session(c, token, now_ms()))
    with pytest.raises(SignInRefused):
        await accounts.membership.sign_in("ada@example.org", PASSWORD, address="")
    assert await accounts.membership.sign_in("ada@example.org", "another password", address="")


async def test_freezing_ends_sessions_and_makes_nobody_an_admin(accounts: Accounts):
    await accounts.membership.sign_up("eve@example.org", PASSWORD, address="")
    eve = do(accounts, people.list_people)[0]
    do(accounts, lambda c: c.execute(people.people.update().values(admin=True)))
    bob = await accounts.membership.sign_up("bob@example.org", PASSWORD, address="")
    old = await accounts.membership.sign_in("eve@example.org", PASSWORD, address="")
    other = await accounts.membership.sign_in("bob@example.org", PASSWORD, address="")
    assert do(accounts, lambda c: people.person_of_session(c, old, now_ms())).admin
    assert do(accounts, lambda c: people.set_frozen(c, eve.account_id, frozen=True))
    with pytest.raises(SignInRefused):
        do(accounts, lambda c: people.person_of_session(c, old, now_ms()))
    assert do(accounts, lambda c: people.person_of_session(c, other, now_ms())) == bob
    new = await accounts.membership.sign_in("eve@example.org", PASSWORD, address="")
    assert do(accounts, lambda c: people.person_of_session(c, new, now_ms())).admin is False
    assert do(accounts, lambda c: people.invite_first_admin(c, now_ms())) is None
    assert do(accounts, lambda c: people.set_frozen(c, eve.account_id, frozen=False))
    assert do(accounts, lambda c: people.person_of_session(c, new, now_ms())).admin is True


async def test_the_first_admin(accounts: Accounts):
    first = do(accounts, lambda c: people.invite_first_admin(c, now_ms()))
    token = do(accounts, lambda c: people.invite_first_admin(c, now_ms()))
    assert first and token
    for bad_token in ("", first):
        with pytest.raises(SignInRefused):
            await accounts.membership.sign_up("eve@example.org", PASSWORD, address="", invitation=bad_token)
    admin = await accounts.membership.sign_up("ada@example.org", PASSWORD, address="", invitation=token)
    assert admin.admin
    with pytest.raises(SignInRefused):
        await accounts.membership.sign_up("eve@example.org", PASSWORD, address="", invitation=token)
    assert do(accounts, lambda c: people.invite_first_admin(c, now_ms())) is None
    assert [person.email for person in do(accounts, people.list_people)] == ["ada@example.org"]


async def test_a_closed_account_is_forgotten_and_the_books_stay(accounts: Accounts):
    person = await accounts.membership.sign_up("ada@example.org", PASSWORD, address="10.0.0.1")
    id = person.account_id
    token = await accounts.membership.sign_in("ada@example.org", PASSWORD, address="10.0.0.1")
    key = do(accounts, lambda c: keys.create(c, accounts.peppers, id, KeySettings(name="Ada's"), now_ms()))
    hold = Hold(
        id="c1", account_id=id, key_id=keys.key_id(key), request="r", model="m", tier="default", tokens=1, amount=5,
        expires_at=now_ms() + 60_000,
    )  # fmt: skip
    do(accounts, lambda c: ledger.hold(c, hold, now_ms()))
    with pytest.raises(LedgerRefused, match="in flight"):
        do(accounts, lambda c: people.close_account(c, id, now_ms()))
    do(accounts, lambda c: ledger.settle(c, "c1", now_ms()))
    assert do(accounts, lambda c: people.close_account(c, id, now_ms())) == FREE - 5
    with pytest.raises(LedgerRefused, match="closed already"):
        do(accounts, lambda c: people.close_account(c, id, now_ms()))
    with pytest.raises(SignInRefused):
        do(accounts, lambda c: people.person_of_session(c, token, now_ms()))
    with pytest.raises(AccountError):
        await accounts.authenticate(key, "")
    with pytest.raises(Forbidden):
        do(accounts, lambda c: keys.create(c, accounts.peppers, id, KeySettings(), now_ms()))
    for table in ("people", "accounts", "keys", "charges", "entries"):
        rows = str(do(accounts, lambda c, table=table: c.exec_driver_sql(f"SELECT * FROM {table}").all()))
        assert not re.search(r"\bada\b", rows.lower()), table  # as a word: digests have all letters up to f
    verification = do(accounts, verify)
    assert verification.drift == () and verification.charges == 1


async def test_what_happened_is_in_the_audit_log(accounts: Accounts):
    person = await accounts.membership.sign_up("ada@example.org", PASSWORD, address="10.0.0.1")
    await accounts.membership.sign_in("ada@example.org", PASSWORD, address="10.0.0.2")
    lines = do(accounts, lambda c: audit.events(c, limit=10))
    assert [(event.action, event.address) for _, event in lines] == [
        ("person.sign_in", "10.0.0.2"),
        ("person.sign_up", "10.0.0.1"),
    ]
    (own,) = do(accounts, lambda c: audit.events(c, subjects=[person.account_id], before=lines[0][0]))
    assert own[1].action == "person.sign_up"


# Spellings from before there was one for each mailbox, and the one of today.
OLD_SPELLINGS = [
    ("e\u0301va@example.org", "\u00e9va@example.org"),  # NFD
    ("ada@xn--exmple-cua.org", "ada@ex\u00e4mple.org"),
    ("ada@exa\u0308mple.org", "ada@ex\u00e4mple.org"),
    ("\uff41da@example.org", None),  # a full-width letter, which is refused today
]


def store_as(accounts: Accounts, person: people.Person, email: str) -> None:
    """Spell a stored address as an earlier version did."""
    do(accounts, lambda c: c.exec_driver_sql(f"UPDATE people SET email = '{email}' WHERE id = '{person.id}'"))


@pytest.mark.parametrize(("old", "today"), OLD_SPELLINGS)
async def test_an_account_of_an_older_spelling_signs_in_and_keeps_its_mailbox(
    accounts: Accounts, old: str, today: str | None
):
    person = await accounts.membership.sign_up("somebody@example.org", PASSWORD, address="")
    store_as(accounts, person, old)
    for spelling in filter(None, (old, old.upper(), today)):
        token = await accounts.membership.sign_in(spelling, PASSWORD, address="")
        assert do(accounts, lambda c, token=token: people.person_of_session(c, token, now_ms())).id == person.id
        assert do(accounts, lambda c, spelling=spelling: people.find_account(c, spelling)).id == person.account_id
    if today is not None:
        with pytest.raises(AddressTaken):
            await accounts.membership.sign_up(today, PASSWORD, address="")
    assert not do(accounts, people.shared_mailboxes)


async def test_two_accounts_of_one_mailbox_are_named_and_both_sign_in(accounts: Accounts):
    old, today = OLD_SPELLINGS[0]
    first = await accounts.membership.sign_up("somebody@example.org", PASSWORD, address="")
    assert today is not None
    second = await accounts.membership.sign_up(today, "another long password", address="")
    store_as(accounts, first, old)
    for spelling, password, person in ((old, PASSWORD, first), (today, "another long password", second)):
        token = await accounts.membership.sign_in(spelling, password, address="")
        assert do(accounts, lambda c, token=token: people.person_of_session(c, token, now_ms())).id == person.id
    assert [{person.id for person in sharing} for sharing in do(accounts, people.shared_mailboxes)] == [
        {first.id, second.id}
    ]


async def test_a_clock_that_steps_back_keeps_no_old_price_and_no_recent_sign_in(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
):
    clock = [now_ms()]
    monkeypatch.setattr("unmask.accounts.accounts.now_ms", lambda: clock[0])
    monkeypatch.setattr("unmask.accounts.membership.now_ms", lambda: clock[0])
    eve = await accounts.membership.sign_up("eve@example.org", PASSWORD, address="")
    do(accounts, lambda c: c.execute(people.people.update().values(password=people.NO_PASSWORD)))
    token = do(accounts, lambda c: people.create_session(c, eve.id, clock[0]))
    do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice("m", "default", 10), clock[0]))
    assert await accounts.price("m", "default") == 10
    await accounts.membership.reauthenticate(eve, "", address="", session=token)
    do(accounts, lambda c: tariff.set_price(c, tariff.TariffPrice("m", "default", 5), clock[0]))
    assert await accounts.price("m", "default") == 10  # at most five seconds old
    clock[0] -= 3_600_000
    assert await accounts.price("m", "default") == 5
    with pytest.raises(SignInRefused, match="too long ago"):
        await accounts.membership.reauthenticate(eve, "", address="", session=token)
