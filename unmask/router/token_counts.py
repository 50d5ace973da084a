"""`TokenCounts`: notices when a provider begins to count tokens otherwise, long before its bill shows it.

All times are handed in, in seconds of a monotonic clock.
"""

import numpy as np

PERIOD_S = 3600.0
MIN_TEXTS = 200
MAX_CHANGE = 0.02


class TokenCounts:
    """A provider's counts of tokens against ours, hour by hour.

    A provider may count a token or two more for each text (BOS, EOS, a template), so the quotient of the counts
    depends on the lengths of the texts. What is constant is `theirs = a * ours + b * texts`: it is fitted to the
    answers of an hour, and predicts the counts of the next one.
    """

    def __init__(self) -> None:
        self._fit: np.ndarray | None = None
        self._began: float | None = None
        self._clear()

    def add(self, ours: int, theirs: int, texts: int, now: float) -> float | None:
        """Take the counts of an answer.

        Returns:
            The share by which the counts of the hour that is over differ from those of the hour before, if that is
            more than `MAX_CHANGE`; otherwise None.
        """
        change = None
        if self._began is None:
            self._began = now
        elif now - self._began >= PERIOD_S and self._texts >= MIN_TEXTS:
            change = self._end_period()
            self._began = now
        row = np.array([ours, texts], dtype=np.float64)
        self._normal += np.outer(row, row)
        self._right += row * theirs
        self._ours += ours
        self._theirs += theirs
        self._texts += texts
        return change

    def _end_period(self) -> float | None:
        change = None
        if self._fit is not None:
            expected = float(self._fit @ np.array([self._ours, self._texts], dtype=np.float64))
            change = self._theirs / expected - 1 if expected > 0 else None
        # Texts of one length have many fits: the smallest of them predicts the same length rightly.
        self._fit = np.linalg.lstsq(self._normal, self._right, rcond=None)[0]
        self._clear()
        return change if change is not None and abs(change) > MAX_CHANGE else None

    def _clear(self) -> None:
        self._normal = np.zeros((2, 2))
        self._right = np.zeros(2)
        self._ours = self._theirs = self._texts = 0
