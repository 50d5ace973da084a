"""Votes over HTTP: one per account and model, and private."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.api.live import LocalService, Reply, running, until
from tests.mail_server import mail_server
from tests.web.conftest import COMING, HTML, REFERENCE
from tests.web.html import Page
from tests.web.people import do, person
from tests.web.test_escaping import POISON
from unmask.accounts import Accounts, audit, people
from unmask.accounts.limits import LocalLimiter
from unmask.accounts.membership import FORMS_PER_MINUTE
from unmask.catalogue import votes
from unmask.catalogue.model_requests import MOST_MODELS_A_DAY
from unmask.catalogue.store import GateOutcome, add_gate_outcome, put_fields, read_record, step
from unmask.onboarding.gates import GATES
from unmask.storage.database import now_ms
from unmask.web import website

Visit = Callable[..., Reply]


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    made = Accounts(f"sqlite:///{tmp_path / 'accounts.sqlite'}", pepper=tmp_path / "pepper")
    yield made
    made.close()


@pytest.fixture
def service(tiny_llama: Path, accounts: Accounts) -> Iterator[LocalService]:
    with ExitStack() as stack:
        yield stack.enter_context(running(tiny_llama, accounts, website, api_keys=(), warm=()))


def signed_in(accounts: Accounts, service: LocalService, email: str) -> Visit:
    """Return a function that requests pages as a signed-in visitor."""
    who = person(accounts, email, nano=0)
    cookie = f"unmask_session={do(accounts, lambda c: people.create_session(c, who.id, now_ms()))}"

    def visit(path: str, **form: str) -> Reply:
        headers = {**HTML, "cookie": cookie}
        if not form:
            return service.call("GET", path, headers=headers, key=None)
        headers["content-type"] = "application/x-www-form-urlencoded"
        return service.call("POST", path, urlencode(form).encode(), headers, key=None)

    return visit


def make_admin(accounts: Accounts, email: str) -> None:
    with accounts.database.begin() as connection:
        connection.exec_driver_sql(f"UPDATE people SET admin = true WHERE email = '{email}'")


def text_of(reply: Reply) -> str:
    return " ".join(Page(reply.body.decode()).text.split())


def token_of(visit: Visit, path: str = f"/models/{COMING}") -> str:
    match = re.search(r'name="token" value="([^"]+)"', visit(path).body.decode())
    assert match
    return match[1]


def vote(visit: Visit, model: str = COMING, **fields: str) -> Reply:
    return visit("/account/votes", model=model, token=token_of(visit), **fields)


def test_no_record_hides_a_page_of_a_model_that_answers(accounts: Accounts, service: LocalService) -> None:
    ada = signed_in(accounts, service, "ada@example.org")
    for ending in (".json", ".md"):
        reply = vote(ada, f"{COMING}{ending}")
        assert reply.status == 400 and "ends in .json or .md" in text_of(reply)
        do(accounts, lambda c, ending=ending: put_fields(c, f"{COMING}{ending}", {}))
        do(accounts, lambda c, ending=ending: step(c, f"{COMING}{ending}", "requested", actor="an older version"))
    until(lambda: f"{COMING}.md" in ada("/models").body.decode())
    assert ada(f"/models/{COMING}.json").json["id"] == COMING
    assert ada(f"/models/{COMING}.md").headers["content-type"].startswith("text/markdown")


def test_a_vote_a_note_and_a_vote_taken_back(accounts: Accounts, service: LocalService) -> None:
    ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
    assert "0 votes for this model" in text_of(ada(f"/models/{COMING}"))
    reply = vote(ada, note="search in letters")
    assert reply.status == 303 and reply.headers["location"] == f"/models/{COMING}#way"
    vote(ada, note="search in books")
    page = ada(f"/models/{COMING}")
    assert "1 vote for this model. One is yours" in text_of(page) and "search in books" in page.body.decode()
    # The alias names the same model.
    vote(ben, model=f"{COMING}-embed")
    assert "2 votes for this model. One is yours" in text_of(ben(f"/models/{COMING}"))
    assert "2 votes. You said: search in books" in text_of(ada("/account/votes"))
    vote(ada, withdraw="1")
    assert "No votes at the moment" in text_of(ada("/account/votes"))
    assert "1 vote for this model." in text_of(ada(f"/models/{COMING}"))


def test_nobody_sees_anybody_elses_votes(accounts: Accounts, service: LocalService) -> None:
    ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
    vote(ada, note="a secret plan")
    with accounts.database.begin() as connection:
        account = next(iter(votes.queue(connection))).model
        assert account == COMING
    pages = ("/", "/models", "/models?sort=votes", f"/models/{COMING}", f"/models/{COMING}.json", "/account/votes",
             "/status", f"/models/{COMING}.md", "/feed.xml", "/llms.txt",
             f"/compare?models={COMING},{REFERENCE}")  # fmt: skip
    for path in pages:
        replies = [ben(path)]
        if path != "/account/votes":
            replies.append(service.call("GET", path, headers=HTML, key=None))
        for reply in replies:
            assert reply.status == 200, path
            assert "secret" not in reply.body.decode() and "ada@" not in reply.body.decode(), path
    assert "One is yours" not in text_of(ben(f"/models/{COMING}"))
    assert "private" in ben(f"/models/{COMING}").headers["cache-control"]
    # Ben's form can withdraw only Ben's vote, and he has none.
    vote(ben, withdraw="1", account_id="anything")
    with accounts.database.read() as connection:
        assert votes.count_votes(connection) == {COMING: 1}


def test_who_is_not_signed_in_is_asked_to(accounts: Accounts, service: LocalService) -> None:
    page = Page(service.call("GET", f"/models/{COMING}", headers=HTML, key=None).body.decode())
    assert f"/sign-in?next=%2Fmodels%2F{COMING.replace('/', '%2F')}" in page.links()
    body = urlencode({"model": COMING}).encode()
    sent = {**HTML, "content-type": "application/x-www-form-urlencoded"}
    for reply in (
        service.call("POST", "/account/votes", body, sent, key=None),
        service.call("GET", "/account/votes", headers=HTML, key=None),
    ):  # fmt: skip
        assert reply.status == 303 and reply.headers["location"].startswith("/sign-in")


def test_a_form_from_elsewhere_is_refused(accounts: Accounts, service: LocalService) -> None:
    ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
    for token in ("", "guessed", token_of(ben)):
        assert ada("/account/votes", model=COMING, token=token).status == 403
    with accounts.database.read() as connection:
        assert votes.count_votes(connection) == {}


@pytest.mark.parametrize("model", [REFERENCE, POISON, "", "a/b/c"])
def test_a_model_that_takes_no_votes_is_named(accounts: Accounts, service: LocalService, model: str) -> None:
    ada = signed_in(accounts, service, "ada@example.org")
    reply = vote(ada, model=model)
    assert reply.status == 400 and "onerror=alert(2)>" not in reply.body.decode().replace("&gt;", "")


def test_a_model_that_is_not_here_is_asked_for(accounts: Accounts, service: LocalService) -> None:
    ada = signed_in(accounts, service, "ada@example.org")
    assert "Name on the Hugging Face hub" in text_of(ada("/models"))
    assert ada("/account/votes", model="org/unheard-of", token=token_of(ada, "/models"), note=POISON[:20]).status == 303
    with accounts.database.read() as connection:
        record = read_record(connection, "org/unheard-of")
    assert record is not None and record.status == "requested"
    until(lambda: ada("/models/org/unheard-of").status == 200)
    assert "Somebody asked for it" in text_of(ada("/models/org/unheard-of"))
    assert "1 vote" in text_of(ada("/models?sort=votes"))


def test_asking_for_models_and_thinking_better_of_it_ends(accounts: Accounts, service: LocalService) -> None:
    ada = signed_in(accounts, service, "ada@example.org")
    token = token_of(ada)
    replies: list[Reply] = []
    for number in range(MOST_MODELS_A_DAY + 1):
        replies.append(ada("/account/votes", model=f"org/number-{number}", token=token))
        ada("/account/votes", model=f"org/number-{number}", token=token, withdraw="1")
    assert [reply.status for reply in replies] == [303] * MOST_MODELS_A_DAY + [400]
    assert "An account can name 5 models a day that the catalogue does not have" in text_of(replies[-1])
    with accounts.database.read() as connection:
        account = people.find_account(connection, "ada@example.org").id
    for path in ("/models", "/models/org/number-1", "/models/org/number-1.json", "/feed.xml"):
        until(lambda path=path: ada(path).status == 200)
        assert account not in ada(path).body.decode()


def test_forms_of_an_account_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    still = LocalLimiter(lambda: 0.0)  # a slow run refills nothing
    with ExitStack() as stack:
        accounts = Accounts(f"sqlite:///{tmp_path / 'a.sqlite'}", pepper=tmp_path / "pepper", limiter=still)
        stack.callback(accounts.close)
        service = stack.enter_context(running(tiny_llama, accounts, website, api_keys=(), warm=()))
        ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
        token = token_of(ada)
        for number in range(FORMS_PER_MINUTE):
            path = ("/account/votes", "/account/keys")[number % 2]
            ada(path, token="guessed", model=COMING)  # of another site, and not counted
            assert ada(path, token=token, model=COMING, name="a key", scopes="embeddings").status < 400
        for path in ("/account/votes", "/account/keys"):
            reply = ada(path, token=token, model=COMING, name="a key", scopes="embeddings")
            assert reply.status == 429 and "Too many tries" in text_of(reply) and int(reply.headers["retry-after"]) > 0
        assert vote(ben).status == 303
        assert ada("/sign-out", token=token).status == 303


def test_records_that_operators_add_are_text(accounts: Accounts, service: LocalService) -> None:
    with accounts.database.begin() as connection:
        fields = {
            "name": POISON,
            "summary": POISON,
            "notes": [POISON],
            "about": {"approach": POISON},
            "licence": POISON,
        }
        put_fields(connection, "org/poisoned", fields)
        step(connection, "org/poisoned", "requested", actor="test", note=POISON)
    ada = signed_in(accounts, service, "ada@example.org")
    until(lambda: ada("/models/org/poisoned").status == 200)
    vote(ada, model="org/poisoned", note=POISON.replace("\u2028", "").replace("\x01", ""))
    for path in (
        "/models/org/poisoned",
        "/models?sort=votes",
        "/account/votes",
        "/models/org/poisoned.md",
        "/feed.xml",
    ):
        text = ada(path).body.decode()
        assert "<script>alert" not in text and "<img src=x" not in text, path
    assert "<img src=x onerror=alert(2)>" in text_of(ada("/account/votes"))


def test_the_operator_sees_the_queue_and_decides(accounts: Accounts, service: LocalService) -> None:
    ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
    other = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-unsup-simcse"
    vote(ada, model=other)
    vote(ada, note=POISON.replace("\u2028", "").replace("\x01", ""))
    vote(ben)
    token = token_of(ben)
    assert ben("/admin/models").status == 403
    assert ben("/admin/models", model=COMING, status="retired", token=token).status == 403
    make_admin(accounts, "ben@example.org")
    page = ben("/admin/models")
    text = text_of(page)
    assert text.index(COMING) < text.index(other) and "2 votes; the newest is of" in text and "onerror=alert(2)" in text
    assert "<img src=x" not in page.body.decode() and "ada@" not in text
    token = token_of(ben, "/admin/models")
    bad_forms = {"status": "benchmarking"}, {"status": "deprecated", "until": "soon"}, {"status": "live"}
    assert [ben("/admin/models", model=COMING, token=token, **fields).status for fields in bad_forms] == [400, 400, 400]
    assert ben("/admin/models", model=COMING, status="retired", token="guessed").status == 403
    assert ben("/admin/models", model=COMING, status="retired", token=token).status == 303
    until(lambda: "It no longer answers" in text_of(ben(f"/models/{COMING}")))
    assert ben("/admin/models", model=COMING, status="coming soon", token=token).status == 303
    with accounts.database.read() as connection:
        record = read_record(connection, COMING)
        lines = [event for _, event in audit.events(connection) if event.action == "model.step"]
    assert record is not None and record.status == "coming soon"
    assert [event.detail["status"] for event in lines] == ["coming soon", "retired"]


def test_they_are_told_on_their_page(accounts: Accounts, service: LocalService) -> None:
    ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
    vote(ada)
    with accounts.database.begin() as connection:
        votes.notify_voters(connection, COMING, 1_800_000_000_000)
    assert f"{COMING} , which you voted for, is live" in text_of(ada("/account")).replace("supervised,", "supervised ,")
    assert f"{COMING} – new" in text_of(ada("/account/votes"))
    assert "which you voted for" not in text_of(ada("/account"))
    page = text_of(ada("/account/votes"))
    assert COMING in page and "– new" not in page
    assert "Live now" not in text_of(ben("/account/votes"))


def staged(accounts: Accounts, model: str, source: Path) -> None:
    """Put a model in the state in which `unmask onboard --stage` leaves it."""
    with accounts.database.begin() as connection:
        put_fields(connection, model, {}, source=str(source))
        for status in ("coming soon", "benchmarking", "staged"):
            step(connection, model, status, actor="test")
        for gate in GATES:
            add_gate_outcome(connection, model, GateOutcome(gate.name, "of the test", True, "passed", {}))


def test_switching_a_model_on_mails_its_voters(
    accounts: Accounts, tiny_llama: Path, golden_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = ["org/first", "org/second"]
    for model in models:
        staged(accounts, model, golden_dir / "tiny_gemma")
    settings = {"api_keys": (), "warm": (), "accounts_url": "kept by the test"}
    with mail_server() as (server, inbox), running(tiny_llama, accounts, website, mail=server, **settings) as service:
        ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
        make_admin(accounts, "ben@example.org")
        for model in models:
            vote(ada, model=model)
        token = token_of(ben, "/admin/models")

        # The first mail is refused. That is logged and shown, without the address.
        inbox.refused = 1
        assert ben("/admin/models", model=models[0], status="live", token=token).status == 303
        until(lambda: "waits, and is tried again" in caplog.text)
        assert "SMTPRecipientsRefused at 127.0.0.1" in caplog.text and "ada@" not in caplog.text
        until(lambda: "1 mail to voters waits" in text_of(ben("/admin/models")))
        assert inbox.letters == []

        # With the next model it is sent, and however long that takes, no page waits for it.
        inbox.open.clear()
        assert ben("/admin/models", model=models[1], status="live", token=token).status == 303
        until(lambda: service.models.find(models[1]) is not None)
        assert service.call("GET", f"/models/{models[1]}", headers=HTML, key=None).status == 200
        assert inbox.letters == []
        inbox.open.set()
        until(lambda: len(inbox.letters) == 2)
        assert sorted(str(letter["Subject"]) for letter in inbox.letters) == [f"{model} is live" for model in models]
        assert set(inbox.addresses) == {"ada@example.org"}
        until(lambda: "to voters" not in text_of(ben("/admin/models")))


def test_a_server_that_starts_mails_what_waits(accounts: Accounts, tiny_llama: Path, golden_dir: Path) -> None:
    staged(accounts, "org/first", golden_dir / "tiny_gemma")
    settings = {"api_keys": (), "warm": (), "accounts_url": "kept by the test"}
    with running(tiny_llama, accounts, website, **settings) as service:
        ada, ben = (signed_in(accounts, service, f"{name}@example.org") for name in ("ada", "ben"))
        make_admin(accounts, "ben@example.org")
        vote(ada, model="org/first")
        assert (
            ben("/admin/models", model="org/first", status="live", token=token_of(ben, "/admin/models")).status == 303
        )
        # Without a mail server the page does not mention mail.
        assert "to voters" not in text_of(ben("/admin/models"))
    with mail_server() as (server, inbox), running(tiny_llama, accounts, website, mail=server, **settings):
        until(lambda: inbox.addresses == ["ada@example.org"])
