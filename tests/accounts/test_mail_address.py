"""One mailbox has one spelling, and what is no plain address is refused and not repaired."""

import contextlib
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unmask.accounts import Accounts, actions, people
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.identity_provider import Identity
from unmask.accounts.mail_address import normalize_email, stored_spellings
from unmask.errors import AddressTaken, SignInRefused, UsageError
from unmask.storage.database import now_ms

PASSWORD = "correct horse battery"
SPELLINGS = {
    "quäck@exämple.com": [
        "QUÄCK@EXÄMPLE.COM", "qua\u0308ck@exa\u0308mple.com", "quäck@xn--exmple-cua.com", " quäck@XN--EXMPLE-CUA.COM ",
    ],
    "ångström@example.org": ["\u212bngstro\u0308m@example.org"],
    "ạ\u0307@example.org": ["a\u0307\u0323@example.org", "A\u0323\u0307@Example.org"],
    "o'neil+news@example.co.uk": ["O'Neil+News@Example.CO.UK"],
}  # fmt: skip
REFUSED = {
    "nothing": "", "no at": "quack", "only at": "@", "no host": "quack@", "no local": "@example.com",
    "two": "a@example.com,b@example.com", "semicolon": "a@example.com;b@example.com", "two ats": "a@b@example.com",
    "brackets": "<quack@example.com>", "display": "Quack <quack@example.com>", "comment": "quack(x)@example.com",
    "quoted": '"quack"@example.com', "mailto": "mailto:quack@example.com", "literal": "quack@[127.0.0.1]",
    "address": "quack@127.0.0.1", "no dot": "quack@localhost", "end dot": "quack@example.com.",
    "dots": "qu..ack@example.com",
    "first dot": ".quack@example.com", "hyphen": "quack@-example.com", "underscore": "quack@exam_ple.com",
    "bad punycode": "quack@xn--\u00e4.com", "fake punycode": "quack@xn--abc.com", "space": "qu ack@example.com",
    "newline": "quack@example.com\n", "header": "quack@example.com\r\nbcc: x@example.org", "tab": "\tquack@example.com",
    "nul": "quack@example.com\x00", "delete": "quack\x7f@example.com", "no-break": "quack@example.com\xa0",
    "zero width": "quack\u200b@example.com", "joiner": "qu\u200dack@example.com", "override": "\u202equack@example.com",
    "soft hyphen": "qu\xadack@example.com", "variation": "quack\ufe0f@example.com",
    "grapheme joiner": "qu\u034fack@example.com",
    "filler": "quack\u3164@example.com", "surrogate": "quack\ud800@example.com", "private": "quack\ue000@example.com",
    "kelvin": "quac\u212a@example.com", "full width": "ｑuack@example.com", "full-width at": "quack＠example.com",
    "full-width dot": "quack@example．com", "ideographic dot": "quack@example。com", "ligature": "oﬃce@example.com",
    "long s": "ſam@example.com", "superscript": "quack²@example.com", "circled": "ⓠuack@example.com",
    "long": "a@" + "b" * 300 + ".example", "long local": "a" * 65 + "@example.com",
    "long bytes": "ä" * 33 + "@example.com",
    "long domain": "a@" + "ü." * 40 + "example",
    "long label": "a@" + "ü" * 62 + ".example",
}  # fmt: skip


@pytest.mark.parametrize("address", SPELLINGS)
def test_one_mailbox_has_one_spelling(address: str) -> None:
    assert {normalize_email(spelling) for spelling in (address, *SPELLINGS[address])} == {address}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_address_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"that is no mail address: .*write it like name@example\.org"):
        normalize_email(REFUSED[name])


@given(st.text(max_size=12), st.sampled_from(["example.org", "exa\u0308mple.org", "EXAMPLE.co.uk", "例え.jp"]))
def test_a_stored_address_is_its_own_normal_form(local: str, domain: str) -> None:
    try:
        stored = normalize_email(f"{local}@{domain}")
    except UsageError:
        return
    assert normalize_email(stored) == stored
    for form in ("NFC", "NFD"):
        assert normalize_email(unicodedata.normalize(form, stored)) == stored
    # Only blanks around it and case are not the caller's own.
    assert unicodedata.normalize("NFC", local.strip(" ").lower()) == stored.rpartition("@")[0]


LABELS = st.text(max_size=70) | st.text("aüßあ例-0", max_size=70) | st.text("abcü0-", max_size=60).map("xn--".__add__)
DOMAINS = st.lists(LABELS, max_size=60).map(".".join)


@example("a@" + "ü." * 40 + "example")
@given(st.text() | st.tuples(st.just("quack") | st.text(max_size=5), DOMAINS).map("@".join))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        address = normalize_email(text)
        domain = stored_spellings(address)[-1].rpartition("@")[2]
        assert len(domain) <= 253
    stored_spellings(text)


@given(st.characters(min_codepoint=0x80), st.sampled_from(["quack", "sam"]))
def test_no_other_character_leads_to_an_ascii_address(character: str, owner: str) -> None:
    for place in range(len(owner)):
        with contextlib.suppress(UsageError):
            assert not normalize_email(f"{owner[:place]}{character}{owner[place + 1 :]}@example.com").isascii()


async def test_every_door_knows_the_mailbox(accounts: Accounts) -> None:
    spellings = ["quäck@exämple.com", *SPELLINGS["quäck@exämple.com"]]
    person = await accounts.membership.sign_up(spellings[1], PASSWORD, address="")
    assert person.email == spellings[0]
    for number, spelling in enumerate(spellings):
        identity = Identity("https://login.example.org", f"subject-{number}", spelling, True)
        with pytest.raises(AddressTaken):
            await accounts.membership.sign_up(spelling, PASSWORD, address=str(number))
        with pytest.raises(AddressTaken):
            await accounts.membership.sign_in_with_identity(identity, address="")
        with accounts.database.begin() as connection:
            assert people.find_account(connection, spelling).id == person.account_id
            with pytest.raises(AddressTaken):
                actions.create_account(connection, COMMAND_LINE, accounts.peppers, "x", now_ms(), email=spelling)


async def test_signing_in_knows_the_mailbox(accounts: Accounts) -> None:
    spellings = ["quäck@exämple.com", *SPELLINGS["quäck@exämple.com"]]
    await accounts.membership.sign_up(spellings[1], PASSWORD, address="")
    for number, spelling in enumerate(spellings):
        assert await accounts.membership.sign_in(spelling, PASSWORD, address=f"10.0.0.{number}")


@pytest.mark.parametrize("name", ["nothing", "brackets", "kelvin", "nul", "newline", "two", "long domain"])
async def test_every_door_refuses_what_is_no_plain_address(accounts: Accounts, name: str) -> None:
    await accounts.membership.sign_up("quack@example.com", PASSWORD, address="")
    address = REFUSED[name]
    with pytest.raises(UsageError):
        await accounts.membership.sign_up(address, PASSWORD, address="")
    with pytest.raises(SignInRefused):
        await accounts.membership.sign_in(address, PASSWORD, address="")
    with pytest.raises(SignInRefused if name == "nothing" else UsageError):
        await accounts.membership.sign_in_with_identity(
            Identity("https://login.example.org", "s", address, True), address=""
        )
    with accounts.database.begin() as connection:
        with pytest.raises(UsageError):
            people.find_account(connection, address)
        with pytest.raises(UsageError):
            actions.create_account(connection, COMMAND_LINE, accounts.peppers, "x", now_ms(), email=address)
        assert [person.email for person in people.list_people(connection)] == ["quack@example.com"]
