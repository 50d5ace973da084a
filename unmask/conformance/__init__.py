"""Check that vectors from anywhere are a model's: canary texts, references of our own engine, the name of a fault."""

from unmask.conformance.canary_run import Answer, Ask, CanaryAnswers, full_run, light_rows
from unmask.conformance.finding import Finding, examine, light_distance, worst_limit
from unmask.conformance.references import (
    PrecisionClass,
    References,
    build_references,
    load_references,
    read_references,
    require_same_model,
    store_references,
)

__all__ = [
    "Answer",
    "Ask",
    "CanaryAnswers",
    "Finding",
    "PrecisionClass",
    "References",
    "build_references",
    "examine",
    "full_run",
    "light_distance",
    "light_rows",
    "load_references",
    "read_references",
    "require_same_model",
    "store_references",
    "worst_limit",
]
