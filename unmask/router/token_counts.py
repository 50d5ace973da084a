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
        # Sums of a least-squares fit, as plain numbers: this runs at every answer.
        self._squares += ours * ours
        self._products += ours * texts
        self._squared_texts += texts * texts
        self._right_ours += ours * theirs
        self._right_texts += texts * theirs
        self._ours += ours
        self._theirs += theirs
        self._texts += texts
        return change

    def _end_period(self) -> float | None:
        change = None
        if self._fit is not None:
            expected = float(self._fit @ np.array([self._ours, self._texts], dtype=np.float64))
            change = self._theirs / expected - 1 if expected > 0 else None
        normal = np.array([[self._squares, self._products], [self._products, self._squared_texts]], dtype=np.float64)
        right = np.array([self._right_ours, self._right_texts], dtype=np.float64)
        # Texts of one length have many fits: the smallest of them predicts the same length rightly.
        self._fit = np.linalg.lstsq(normal, right, rcond=None)[0]
        self._clear()
        return change if change is not None and abs(change) > MAX_CHANGE else None

    def _clear(self) -> None:
        self._squares = self._products = self._squared_texts = 0
        self._right_ours = self._right_texts = 0
        self._ours = self._theirs = self._texts = 0
