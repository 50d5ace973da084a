"""Onboarding: the gates that a model passes between a request and live, as `unmask onboard` runs them."""

from unmask.onboarding.run import OnboardingOptions, OnboardingResult, onboard

__all__ = ["OnboardingOptions", "OnboardingResult", "onboard"]
