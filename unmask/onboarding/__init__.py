"""From a name to a live model, through gates that measure: what `unmask onboard` does."""

from unmask.onboarding.run import OnboardingOptions, OnboardingResult, onboard

__all__ = ["OnboardingOptions", "OnboardingResult", "onboard"]
