"""`DailyCost`: nano-dollars that a provider has cost since midnight, UTC, to hold it to the operator's limit."""

from datetime import UTC, date, datetime, timedelta


class DailyCost:
    """The cost of a day: what the books had when they were last read, and what this process added since.

    Other processes' costs are known once the books are read, so all together may exceed a limit by what they spend
    between two readings.
    """

    def __init__(self) -> None:
        self._day = date.min
        self._own = 0
        self._booked = 0
        self._own_when_read = 0

    def add(self, cost: int, day: date) -> None:
        """Count the cost of an attempt of this process."""
        self._start_day(day)
        self._own += cost

    def own(self, day: date) -> int:
        """Return the cost of this process; to be taken before the books are read."""
        self._start_day(day)
        return self._own

    def take_books(self, booked: int, own: int, day: date) -> None:
        """Take over the total of the books.

        Args:
            booked: of all processes.
            own: the result of `own` before the books were read.
            day: the day of both.
        """
        self._start_day(day)
        self._booked, self._own_when_read = booked, own

    def total(self, day: date) -> int:
        """Return the cost of a day so far."""
        self._start_day(day)
        return max(self._own, self._booked + self._own - self._own_when_read)

    def _start_day(self, day: date) -> None:
        if day > self._day:
            self._day, self._own, self._booked, self._own_when_read = day, 0, 0, 0


def today() -> date:
    """Return the day in UTC."""
    return datetime.now(UTC).date()


def seconds_to_midnight() -> float:
    """Return the seconds until the next day begins in UTC."""
    now = datetime.now(UTC)
    tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return (tomorrow - now).total_seconds()
