"""`RetryBudget`: tokens of retries or hedges that a model may cause. In tokens, since requests differ ten-thousandfold.

All times are handed in, in seconds of a monotonic clock.
"""

from collections import deque

SHARE = 0.10
RESERVE_PER_S = 8192
LIFE_S = 10.0


class RetryBudget:
    """Tokens for further attempts: a share of the tokens of first attempts, and a reserve for quiet times.

    In any `LIFE_S` seconds, withdrawals are at most `share` of the deposits of these seconds plus the reserve.

    Args:
        share: of the tokens of first attempts.
        reserve: tokens per second, whatever the deposits.
    """

    def __init__(self, share: float = SHARE, reserve: int = RESERVE_PER_S) -> None:
        self._share, self._reserve = share, reserve
        self._deposits = _Window()
        self._withdrawals = _Window()

    def deposit(self, tokens: int, now: float) -> None:
        """Count a first attempt."""
        self._deposits.add(tokens, now)

    def withdraw(self, tokens: int, now: float) -> bool:
        """Take the tokens of a further attempt. Returns False, and takes nothing, if there are not enough."""
        if not self.covers(tokens, now):
            return False
        self._withdrawals.add(tokens, now)
        return True

    def covers(self, tokens: int, now: float) -> bool:
        """True if `withdraw` would take the tokens."""
        available = self._share * self._deposits.total(now) + self._reserve * LIFE_S
        return self._withdrawals.total(now) + tokens <= available


class _Window:
    """The sum of the amounts of the last `LIFE_S` seconds."""

    def __init__(self) -> None:
        self._amounts: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, amount: int, now: float) -> None:
        self.total(now)  # drops the old amounts, also when no retry asks for the total
        self._amounts.append((now, amount))
        self._total += amount

    def total(self, now: float) -> int:
        while self._amounts and self._amounts[0][0] <= now - LIFE_S:
            self._total -= self._amounts.popleft()[1]
        return self._total
