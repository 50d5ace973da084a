"""`WatchIntervals`: how often providers are checked by the canaries."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class WatchIntervals:
    """Times of the canaries, in seconds.

    Attributes:
        busy, idle: between two light runs of an endpoint with traffic and without.
        second: between a wrong light run and the one that decides.
        full: between two full runs, give or take a tenth.
        retry: after a full run that got no answer; twice as long each time, up to `idle`.
        costs: between two readings of what providers have cost today.
        readmit: before each of the full runs that end a quarantine, see `Providers.readmit`.
    """

    busy: float = 60.0
    idle: float = 600.0
    second: float = 2.0
    full: float = 24 * 3600.0
    retry: float = 5.0
    costs: float = 10.0
    readmit: float = 600.0

    def with_canaries(self, seconds: float | None) -> "WatchIntervals":
        """Return these times with another one between light runs, which is never longer with traffic than without.

        Args:
            seconds: with traffic; None leaves all as they are.
        """
        return self if seconds is None else replace(self, busy=seconds, idle=max(seconds, self.idle))
