"""Votes, the queue they make, and the notices that follow, by page and by mail."""

import smtplib
import threading
from collections.abc import Iterator
from email.message import EmailMessage

import pytest

from tests.mail_server import Inbox, free_port, mail_server
from unmask.accounts import people
from unmask.accounts.keys import Peppers
from unmask.catalogue.mail import send_notices
from unmask.catalogue.mail_server import MailServer
from unmask.catalogue.model_requests import MOST_MODELS, MOST_MODELS_A_DAY, MOST_VOTES, request_model
from unmask.catalogue.store import put_fields, read_record, step, version
from unmask.catalogue.votes import (
    claim_letters,
    count_unsent_letters,
    count_votes,
    mark_notices_read,
    notices_of,
    notify_voters,
    queue,
    unclaim_letter,
    vote,
    votes_of,
    withdraw,
)
from unmask.errors import UsageError
from unmask.storage.database import Database, now_ms

COMING = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
OTHER = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-unsup-simcse"


@pytest.fixture
def voters(database: Database, tmp_path) -> list[str]:
    """Three accounts with people."""
    peppers = Peppers(tmp_path / "pepper")
    with database.begin() as connection:
        return [
            people.sign_up(connection, peppers, f"{name}@example.org", "hash", 1).account_id
            for name in ("ada", "ben", "cyd")
        ]


def test_one_vote_each(database: Database, voters: list[str]) -> None:
    ada, ben, cyd = voters
    with database.begin() as connection:
        assert vote(connection, ada, COMING, "search  in\nletters", 10)
        assert not vote(connection, ada, COMING, "search in books", 11)
        assert vote(connection, ben, COMING, "", 12) and vote(connection, cyd, OTHER, "ranking", 5)
    with database.begin() as connection:
        assert count_votes(connection) == {COMING: 2, OTHER: 1}
        assert {model: own.note for model, own in votes_of(connection, ada).items()} == {COMING: "search in books"}
        assert votes_of(connection, "acct_nobody") == {}
        assert [(w.model, w.votes, w.notes) for w in queue(connection)] == [
            (COMING, 2, ("search in books",)),
            (OTHER, 1, ("ranking",)),
        ]
        assert withdraw(connection, ben, COMING) and not withdraw(connection, ben, COMING)
        # Equal now: who has waited longest comes first.
        assert [w.model for w in queue(connection)] == [OTHER, COMING]


def test_a_model_that_nobody_knows_is_requested(database: Database, voters: list[str]) -> None:
    with database.begin() as connection:
        assert request_model(connection, voters[0], "org/unheard-of", "", 1)
        assert not request_model(connection, voters[0], "org/unheard-of", "again", 2)
        record = read_record(connection, "org/unheard-of")
    assert record is not None and record.status == "requested"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("<script>", "no id of a model"), ("org/../x", "no id of a model"), ("a/b/c", "no id"), ("", "no id"),
        ("org/live.json", "ends in .json"), ("org/new.MD", "ends in .json or .md"),
        ("Org/Live", "is here as 'org/live'"), ("Unmask/SmolLM2-embed-6l", "is here as 'unmask/smollm2-embed-6l'"),
        ("sentence-transformers/all-MiniLM-L6-v2", "will not be served"), ("org/live", "answers already"),
    ],
)  # fmt: skip
def test_a_model_that_takes_no_votes(database: Database, voters: list[str], model: str, message: str) -> None:
    with database.begin() as connection:
        put_fields(connection, "org/live", {})
        for status in ("coming soon", "benchmarking", "staged", "live"):
            step(connection, "org/live", status, actor="me")
    with pytest.raises(UsageError, match=message), database.begin() as connection:
        request_model(connection, voters[0], model, "", 1)
    with database.read() as connection:
        assert count_votes(connection) == {} and read_record(connection, "<script>") is None


def test_open_votes_of_an_account_are_limited(database: Database, voters: list[str]) -> None:
    with database.begin() as connection:
        for number in range(MOST_VOTES):
            put_fields(connection, f"org/number-{number}", {})
            request_model(connection, voters[0], f"org/number-{number}", "", 1)
    with pytest.raises(UsageError, match="50 open votes"), database.begin() as connection:
        request_model(connection, voters[0], "org/one-more", "", 1)
    with database.begin() as connection:
        assert request_model(connection, voters[1], "org/number-1", "", 1)
        assert not request_model(connection, voters[0], "org/number-1", "another note", 1)
        assert read_record(connection, "org/one-more") is None


def test_models_that_an_account_puts_on_record_are_limited(database: Database, voters: list[str]) -> None:
    """A withdrawn vote leaves the record, so the open votes limit nothing here."""
    ada, ben, _ = voters
    now = now_ms()

    def ask(account: str, number: int, at: int) -> None:
        with database.begin() as connection:
            request_model(connection, account, f"org/number-{number}", "", at)
            assert withdraw(connection, account, f"org/number-{number}")

    for number in range(MOST_MODELS_A_DAY):
        ask(ada, number, now)
    with pytest.raises(UsageError, match="5 models a day"):
        ask(ada, MOST_MODELS, now)
    ask(ada, 0, now)  # is on record already
    ask(ben, MOST_MODELS, now)
    for number in range(MOST_MODELS_A_DAY, MOST_MODELS):
        ask(ada, number, now + 2 * 86_400_000)
    with pytest.raises(UsageError, match="name 20 models"):
        ask(ada, MOST_MODELS + 1, now + 2 * 86_400_000)
    with database.read() as connection:
        before = version(connection)
        assert read_record(connection, f"org/number-{MOST_MODELS + 1}") is None
    with pytest.raises(UsageError):
        ask(ada, MOST_MODELS + 2, now)
    with database.read() as connection:
        assert version(connection) == before


def test_a_note_has_a_length(database: Database, voters: list[str]) -> None:
    for note in ("x" * 501, "a\x07bell"):
        with pytest.raises(UsageError, match="500 characters"), database.begin() as connection:
            vote(connection, voters[0], COMING, note, 1)


def test_those_who_wanted_it_are_told_once(database: Database, voters: list[str]) -> None:
    ada, ben, cyd = voters
    with database.begin() as connection:
        for account, model in ((ada, COMING), (ben, COMING), (cyd, OTHER)):
            vote(connection, account, model, "", 1)
        assert notify_voters(connection, COMING, 20) == 2 and notify_voters(connection, COMING, 21) == 0
        assert count_votes(connection) == {OTHER: 1}
        assert [(n.model, n.at, n.seen) for n in notices_of(connection, ada)] == [(COMING, 20, False)]
        assert notices_of(connection, cyd) == []
        assert mark_notices_read(connection, ada, 30) == 1 and mark_notices_read(connection, ada, 31) == 0
        assert notices_of(connection, ada)[0].seen and not notices_of(connection, ben)[0].seen


def test_a_closed_account_leaves_nothing(database: Database, voters: list[str]) -> None:
    with database.begin() as connection:
        vote(connection, voters[0], COMING, "a secret plan", 1)
        vote(connection, voters[0], OTHER, "", 1)
        notify_voters(connection, OTHER, 2)
        people.close_account(connection, voters[0], 3)
        assert count_votes(connection) == {} and notices_of(connection, voters[0]) == []


@pytest.fixture
def mail() -> Iterator[tuple[MailServer, Inbox]]:
    with mail_server() as started:
        yield started


def test_notices_are_mailed_once(database: Database, voters: list[str], mail: tuple[MailServer, Inbox]) -> None:
    server, inbox = mail
    with database.begin() as connection:
        vote(connection, voters[0], COMING, "a secret plan", 1)
        vote(connection, voters[1], COMING, "", 1)
        notify_voters(connection, COMING, 2)
    assert send_notices(database, server) == (2, "")
    assert send_notices(database, server) == (0, "")
    assert inbox.addresses == ["ada@example.org", "ben@example.org"]
    text = str(inbox.letters[0].get_payload(decode=True))
    assert f"https://embed.example.org/models/{COMING}" in text and "secret" not in text
    assert inbox.letters[0]["Subject"] == f"{COMING} is live" and inbox.letters[0]["From"] == "models@example.org"


def test_a_stop_leaves_the_letters_that_are_not_sent_for_the_next_time(
    database: Database, voters: list[str], mail: tuple[MailServer, Inbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, inbox = mail
    stopping = threading.Event()
    send_message = smtplib.SMTP.send_message

    def stop_after_it(session: smtplib.SMTP, message: EmailMessage) -> None:
        with database.read() as connection:
            assert count_unsent_letters(connection) == 15 - 10  # a killed process loses a few letters, not all
        send_message(session, message)
        stopping.set()

    with database.begin() as connection:
        for account in voters:
            for number in range(5):
                vote(connection, account, f"org/model-{number}", "", 1)
        for number in range(5):
            notify_voters(connection, f"org/model-{number}", 2)
    with monkeypatch.context() as patch:
        patch.setattr(smtplib.SMTP, "send_message", stop_after_it)
        assert send_notices(database, server, stopping) == (1, "")
    with database.read() as connection:
        assert count_unsent_letters(connection) == 14
    assert send_notices(database, server, stopping) == (0, "")
    assert send_notices(database, server) == (14, "")
    assert len({(letter["To"], letter["Subject"]) for letter in inbox.letters}) == len(inbox.letters) == 15


def test_what_could_not_be_mailed_is_tried_again(
    database: Database, voters: list[str], mail: tuple[MailServer, Inbox]
) -> None:
    server, inbox = mail
    with database.begin() as connection:
        vote(connection, voters[0], COMING, "", 1)
        notify_voters(connection, COMING, 2)
    inbox.refused = 1
    assert send_notices(database, server) == (0, "SMTPRecipientsRefused at 127.0.0.1")
    nowhere = MailServer(f"smtp://127.0.0.1:{free_port()}", "models@example.org", "http://localhost")
    sent, reason = send_notices(database, nowhere)
    assert sent == 0 and reason.startswith("ConnectionRefusedError")
    assert send_notices(database, server) == (1, "") and len(inbox.letters) == 1


def test_an_address_that_is_refused_holds_nobody_up(
    database: Database, voters: list[str], mail: tuple[MailServer, Inbox]
) -> None:
    server, inbox = mail
    with database.begin() as connection:
        for account in voters:
            vote(connection, account, COMING, "", 1)
        people.open_account(connection, "without anybody to write to", 1)
        notify_voters(connection, COMING, 2)
        letters = claim_letters(connection, 3)
        for letter in letters:
            unclaim_letter(connection, letter)
        assert count_unsent_letters(connection) == 3
    inbox.unknown = letters[0].to
    assert send_notices(database, server) == (2, "SMTPRecipientsRefused at 127.0.0.1")
    assert inbox.addresses == sorted(letter.to for letter in letters[1:])
    with database.read() as connection:
        assert count_unsent_letters(connection) == 1
    inbox.unknown = ""
    assert send_notices(database, server) == (1, "")
    with database.read() as connection:
        assert count_unsent_letters(connection) == 0


@pytest.mark.parametrize(
    ("url", "sender", "site", "message"),
    [
        ("mail.example.org", "a@b.c", "https://x", "smtp://host:port"),
        ("smtp://h", "nobody", "https://x", "--mail-from"),
        ("smtp://h", "a@b.c", "", "name it with --public-url"),
    ],
)
def test_a_wrong_mail_server_is_said(url: str, sender: str, site: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MailServer(url, sender, site)


def test_a_password_goes_over_no_open_line(mail: tuple[MailServer, Inbox]) -> None:
    plain = mail[0].url.replace("smtp://", "smtp://me:secret@")
    with pytest.raises(smtplib.SMTPNotSupportedError):
        MailServer(plain, "a@b.c", "http://localhost").connect()
    assert "secret" not in repr(MailServer(plain, "a@b.c", "http://localhost"))
