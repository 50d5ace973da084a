"""`KeyFields`: the settings of an API key as texts in a form."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from unmask.accounts import money
from unmask.accounts.keys import SCOPES, KeySettings
from unmask.errors import UsageError
from unmask.web.forms import Form, parse_amount, parse_whole_number


@dataclass(frozen=True)
class KeyFields:
    """Texts of the form's fields."""

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
    def from_settings(cls, settings: KeySettings) -> "KeyFields":
        """Fill the form with the settings of a key."""
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
    def from_form(cls, form: Form) -> "KeyFields":
        """Read the fields as a visitor typed them."""
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

    def to_settings(self, now: int, models: Collection[str], previous: KeySettings | None = None) -> KeySettings:
        """Convert the texts to settings.

        Args:
            now: Unix milliseconds.
            models: ids that may be chosen.
            previous: the key's settings so far; None for a new key.

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
            requests_per_minute=parse_whole_number(self.requests_per_minute, "requests per minute"),
            tokens_per_minute=parse_whole_number(self.tokens_per_minute, "tokens per minute"),
            spend_limit=parse_amount(self.spend_limit) if self.spend_limit else None,
            spend_window=self.spend_window or None,
            expires_at=self._expires_at(now, previous),
        )

    def _expires_at(self, now: int, previous: KeySettings | None) -> int | None:
        if previous is not None and self.expires == KeyFields.from_settings(previous).expires:
            return previous.expires_at  # exact to the millisecond; the form shows only the day
        if not self.expires:
            return None
        try:
            day = date.fromisoformat(self.expires)
        except ValueError:
            raise UsageError(f"the last day {self.expires[:20]!r} is none: write it like 2027-01-31") from None
        if day == date.max:
            raise UsageError(f"the last day {day} is too late: leave it empty for a key without a last day")
        end = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000) + 24 * 3600 * 1000
        if end <= now:
            raise UsageError(f"the last day {day} is over: choose a later one")
        return end


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _last_day(expires_at: int) -> date:
    return (datetime.fromtimestamp(expires_at / 1000, UTC) - timedelta(milliseconds=1)).date()
