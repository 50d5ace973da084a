"""From the fields of a form to what the accounts room takes, and back for a form that is shown again."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from unmask.accounts import money
from unmask.accounts.keys import SCOPES, KeySettings
from unmask.errors import UsageError
from unmask.web.sessions import Form


@dataclass(frozen=True)
class KeyFields:
    """A key's settings as texts in a form."""

    name: str = ""
    scopes: tuple[str, ...] = SCOPES
    models: tuple[str, ...] = ()
    spend_limit: str = ""
    spend_window: str = ""
    requests_per_minute: str = ""
    tokens_per_minute: str = ""
    networks: str = ""
    expires: str = ""

    @classmethod
    def of(cls, settings: KeySettings) -> "KeyFields":
        """As they are for a key."""
        return cls(
            name=settings.name,
            scopes=settings.scopes,
            models=settings.models or (),
            spend_limit="" if settings.spend_limit is None else money.format_dollars(settings.spend_limit),
            spend_window=settings.spend_window or "",
            requests_per_minute=_number(settings.requests_per_minute),
            tokens_per_minute=_number(settings.tokens_per_minute),
            networks="\n".join(settings.networks or ()),
            expires="" if settings.expires_at is None else _last_day(settings.expires_at).isoformat(),
        )

    @classmethod
    def read(cls, form: Form) -> "KeyFields":
        """As they were typed."""
        return cls(
            name=form.get("name"),
            scopes=tuple(form.all("scopes")),
            models=tuple(form.all("models")),
            spend_limit=form.get("spend_limit"),
            spend_window=form.get("spend_window"),
            requests_per_minute=form.get("requests_per_minute"),
            tokens_per_minute=form.get("tokens_per_minute"),
            networks=form.raw("networks"),
            expires=form.get("expires"),
        )

    def settings(self, now: int, models: Collection[str], before: KeySettings | None = None) -> KeySettings:
        """What they mean.

        Args:
            now: Unix milliseconds.
            models: ids that may be chosen.
            before: the key's settings until now.

        Raises:
            UsageError: a field is wrong.
        """
        unknown = next((model for model in self.models if model not in models), None)
        if unknown is not None:
            raise UsageError(f"there is no model {unknown[:100]!r}: choose out of the list")
        return KeySettings(
            name=self.name,
            scopes=self.scopes,
            models=self.models or None,
            networks=tuple(self.networks.replace(",", " ").split()) or None,
            requests_per_minute=whole(self.requests_per_minute, "requests per minute"),
            tokens_per_minute=whole(self.tokens_per_minute, "tokens per minute"),
            spend_limit=dollars(self.spend_limit) if self.spend_limit else None,
            spend_window=self.spend_window or None,
            expires_at=self._expires_at(now, before),
        )

    def _expires_at(self, now: int, before: KeySettings | None) -> int | None:
        if before is not None and self.expires == KeyFields.of(before).expires:
            return before.expires_at  # to the very millisecond, which the form does not show
        if not self.expires:
            return None
        try:
            day = date.fromisoformat(self.expires)
        except ValueError:
            raise UsageError(f"the last day {self.expires[:20]!r} is none: write it like 2027-01-31") from None
        end = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000) + 24 * 3600 * 1000
        if end <= now:
            raise UsageError(f"the last day {day} is over: choose a later one")
        return end


def whole(text: str, what: str) -> int | None:
    """A number greater than 0; None where nothing was typed.

    Raises:
        UsageError: it is none.
    """
    digits = text.replace(",", "").replace(" ", "")
    if not digits:
        return None
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 12 or int(digits) == 0:
        raise UsageError(f"{what}: {text[:40]!r} is no whole number greater than 0")
    return int(digits)


def dollars(text: str) -> int:
    """Nano-dollars of an amount.

    Raises:
        UsageError: it is none.
    """
    try:
        return money.parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def sentence(error: Exception) -> str:
    """An error's message to stand by itself on a page."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _last_day(expires_at: int) -> date:
    return (datetime.fromtimestamp(expires_at / 1000, UTC) - timedelta(milliseconds=1)).date()
