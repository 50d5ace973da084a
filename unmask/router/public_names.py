"""`PublicNames`: the names by which callers know the providers, which are letters on a server that hides them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from string import ascii_uppercase

from unmask.accounts.usage import OWN_ENGINE
from unmask.router.choosing import ProviderPreferences

# Name of providers that the file no longer has, on old charges.
_FORMER = "former"


@dataclass(frozen=True)
class PublicNames:
    """Names of providers for callers. The operator always sees the real ones.

    Attributes:
        hides: callers see letters, in the order of the file, and learn neither kind, country nor cost of a provider.
    """

    hides: bool = False
    _letters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str], *, hides: bool) -> "PublicNames":
        """Return the public names of providers.

        Args:
            names: of all providers, in the order of the file. One that is added at its end changes no other's letter.
            hides: give them letters.
        """
        return cls(hides, {name: _letter(index) for index, name in enumerate(names)} if hides else {})

    def public_name(self, name: str) -> str:
        """Return the name that callers see; this server's own engine keeps its own."""
        if not self.hides or name == OWN_ENGINE:
            return name
        return self._letters.get(name, _FORMER)

    def real_preferences(self, preferences: ProviderPreferences) -> ProviderPreferences:
        """Return a caller's preferences with the real names. A hidden name that is guessed rightly means nobody."""
        if not self.hides:
            return preferences
        real = {letter: name for name, letter in self._letters.items()} | {OWN_ENGINE: OWN_ENGINE}

        def names(letters: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(real.get(letter, "") for letter in letters)  # no provider has the empty name

        return replace(
            preferences,
            only=names(preferences.only),
            ignore=names(preferences.ignore),
            order=names(preferences.order),
        )


def _letter(index: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    index, last = divmod(index, len(ascii_uppercase))
    return (_letter(index - 1) if index else "") + ascii_uppercase[last]
