"""From a name to a live model, through gates that measure: what `unmask onboard` does."""

from unmask.onboarding.run import Onboarding, Result, onboard

__all__ = ["Onboarding", "Result", "onboard"]
