"""The status of a model on its way into service, and the allowed steps.

requested -> coming soon -> benchmarking -> staged -> live -> deprecated -> retired
"""

from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from typing import Literal, get_args

import msgspec

Status = Literal["requested", "coming soon", "benchmarking", "staged", "live", "deprecated", "retired"]

STATUSES: tuple[Status, ...] = get_args(Status)

# The gates between "benchmarking" and "staged", in their order; `unmask.onboarding.gates` runs them.
GATE_NAMES = ("licence", "digests", "load", "parity", "quality", "speed", "price", "canary")

# A failed gate sends a model back to "coming soon", a deprecation can be taken back, and a retired model can be
# requested again. No other step goes backwards, and no model is live that was not staged.
ALLOWED: dict[Status, frozenset[Status]] = {
    "requested": frozenset({"coming soon", "retired"}),
    "coming soon": frozenset({"benchmarking", "retired"}),
    "benchmarking": frozenset({"staged", "coming soon"}),
    "staged": frozenset({"live", "benchmarking", "retired"}),
    "live": frozenset({"deprecated"}),
    "deprecated": frozenset({"live", "retired"}),
    "retired": frozenset({"requested", "coming soon"}),
}

MEANING: dict[Status, str] = {
    "requested": "Somebody asked for it; nobody has decided yet.",
    "coming soon": "It will be brought in; its weights are not here yet.",
    "benchmarking": "It is being loaded, compared with its reference, and measured.",
    "staged": "It passed its gates and can be switched on.",
    "live": "It answers requests.",
    "deprecated": "It still answers, until the day that is announced.",
    "retired": "It no longer answers.",
}


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step in a model's history.

    Attributes:
        status: of the model from then on.
        on: the day.
        note: why, in a sentence.
        until: for a deprecation, the last day on which it answers.
    """

    status: Status
    on: date
    note: str = ""
    until: date | None = None

    def __post_init__(self) -> None:
        if (self.status == "deprecated") != (self.until is not None):
            raise ValueError(f"'until' belongs to a deprecation and to nothing else, but the status is {self.status!r}")


def check_history(history: Sequence[Event]) -> None:
    """Check that each step may follow the one before it. A history may begin with any status.

    Raises:
        ValueError: a step is not allowed, or a day lies before the one before it.
    """
    for before, event in pairwise(history):
        if event.status not in ALLOWED[before.status]:
            allowed = " or ".join(repr(status) for status in STATUSES if status in ALLOWED[before.status])
            raise ValueError(f"{event.status!r} cannot follow {before.status!r}; after that comes {allowed}")
        if event.on < before.on:
            raise ValueError(f"{event.status!r} on {event.on} stands after {before.status!r} on {before.on}")
