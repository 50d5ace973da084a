"""`Admission`: whether an endpoint's vectors may be used, and whether that has changed since a request was sent."""

from dataclasses import dataclass
from typing import Literal

AdmissionState = Literal["unchecked", "admitted", "quarantined"]


@dataclass(eq=False)
class Admission:
    """The state of one endpoint. An endpoint that is made anew from the file of providers shares it with the old one.

    Attributes:
        state: whether vectors may be used.
        changes: number of changes of the state so far. An endpoint that was taken out and let in again while a request
            was under way may have answered it wrongly, and only this number tells.
        is_suspended: taken out by one wrong canary; the next run of canaries decides.
    """

    state: AdmissionState = "unchecked"
    changes: int = 0
    is_suspended: bool = False

    def change(self, state: AdmissionState) -> None:
        """Set the state. Ends a suspension."""
        self.changes += state != self.state
        self.state, self.is_suspended = state, False

    def suspend(self) -> None:
        """Take an admitted endpoint out until the next run of canaries."""
        if self.state == "admitted":
            self.change("unchecked")
            self.is_suspended = True

    def resume(self) -> None:
        """Let the endpoint in again, if nothing but `suspend` had taken it out."""
        if self.is_suspended:
            self.change("admitted")

    def is_unchanged(self, changes: int) -> bool:
        """True if the endpoint is admitted, and has been since `changes` was read."""
        return self.state == "admitted" and self.changes == changes
