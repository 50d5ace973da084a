"""Onboarding: the gates that a model passes between a request and live, as `unmask onboard` runs them."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.onboarding.options import OnboardingOptions
    from unmask.onboarding.run import OnboardingResult, onboard

__all__ = ["OnboardingOptions", "OnboardingResult", "onboard"]

__getattr__ = lazy_exports(
    __name__,
    {
        "options": ("OnboardingOptions",),
        "run": ("OnboardingResult", "onboard"),
    },
)
