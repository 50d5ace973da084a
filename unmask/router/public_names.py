"""`PublicNames`: the names by which callers know the providers, which are letters on a server that hides them."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from string import ascii_uppercase

from unmask.accounts.usage import OWN_ENGINE
from unmask.router.choosing import ProviderPreferences

# Name of providers that the file no longer has, on old charges.
_FORMER = "former"
# Seconds for which a removed name stays known: requests with it were right a moment ago, and another process may not
# have read the file again.
_FORMER_NAME_S = 600.0


@dataclass(frozen=True)
class PublicNames:
    """Names of providers for callers. The operator always sees the real ones.

    Attributes:
        hides: callers see letters, in the order of the file, and learn neither kind, country nor cost of a provider.
        for_callers: names that callers may use: this server's own engine, and all providers of the file.
    """

    hides: bool = False
    for_callers: tuple[str, ...] = (OWN_ENGINE,)
    _letters: Mapping[str, str] = field(default_factory=dict)
    _removed_at: Mapping[str, float] = field(default_factory=dict)  # former names, by `time.monotonic()`

    @classmethod
    def of(cls, names: Iterable[str], *, hides: bool, earlier: "PublicNames | None" = None) -> "PublicNames":
        """Return the public names of providers.

        Args:
            names: of all providers, in the order of the file. One that is added at its end changes no other's letter.
            hides: give them letters.
            earlier: the names before the file was read again.
        """
        real_names = list(names)
        letters = {name: _letter(index) for index, name in enumerate(real_names)} if hides else {}
        for_callers = OWN_ENGINE, *(letters.get(name, name) for name in real_names)
        removed_at: dict[str, float] = {}
        if earlier is not None:
            removed = [name for name in earlier.for_callers if name not in for_callers]
            removed_at = {**earlier._removed_at, **dict.fromkeys(removed, time.monotonic())}
        return cls(hides, for_callers, letters, removed_at)

    def is_known(self, name: str) -> bool:
        """True for a name that callers may use, or could use a moment ago, before the file was read again."""
        removed_at = self._removed_at.get(name, float("-inf"))
        return name in self.for_callers or time.monotonic() - removed_at < _FORMER_NAME_S

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
