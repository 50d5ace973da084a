"""The lines that a server prints once it accepts connections."""

import logging
import sys

from unmask.accounts import Accounts, people, tariff
from unmask.api.settings import ServeSettings
from unmask.errors import NoPrice
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.terminal import abandon_stdout

log = logging.getLogger("unmask")


def create_invitation(accounts: Accounts, url: str) -> str | None:
    """Create the link that makes the first admin, once and within a day. Return None if there is an admin."""
    now = now_ms()
    with accounts.database.begin() as connection:
        token = people.invite_first_admin(connection, now)
    return f"{url.rstrip('/')}/first-admin?invitation={token}" if token else None


def announce(
    url: str, models: ModelRegistry, settings: ServeSettings, accounts: Accounts | None, invitation: str | None
) -> None:
    """Print the address, the models, a request to try, and the next steps of the operator.

    A server that is ready does not end because nobody can read this: it logs a warning.
    """
    records = [model.record for model in models.list()]
    width = max((len(record.id) for record in records), default=0)
    lines = [
        f"unmask serves {url}/v1",
        *(f"  {record.id:<{width}}  {record.summary}".rstrip() for record in records),
    ]
    if records:
        needs_key = settings.api_keys or accounts is not None
        key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
        body = f'{{"model": "{records[0].id}", "input": "some text"}}'
        lines.append(f"curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} -d '{body}'")
    if accounts is not None:
        lines += _account_lines(accounts, [record.id for record in records])
        if invitation:
            lines.append(
                f"There is no admin yet. Whoever opens this link first becomes one, within a day: {invitation}"
            )
    elif not settings.api_keys:
        lines.append("No accounts and no keys: whoever uses this machine may call it.")
    if sys.stdout is None:
        _warn(url, "it is closed")
        return
    try:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except OSError as error:
        abandon_stdout()
        _warn(url, error.strerror or str(error))


def _warn(url: str, reason: str) -> None:
    log.warning(
        "the server answers at %s, but its first lines cannot be written to standard output: %s; lead it to a file or "
        "/dev/null",
        url,
        reason,
    )


def _account_lines(accounts: Accounts, models: list[str]) -> list[str]:
    lines = [f"Accounts in {accounts.database.display_url}: callers need a key, see 'unmask accounts --help'."]
    with accounts.database.read() as connection:
        for model in models:
            try:
                tariff.find_price(connection, model, "default")
            except NoPrice:
                lines.append(f"No price for {model}, so it answers nobody yet: unmask accounts price {model} DOLLARS")
    return lines
