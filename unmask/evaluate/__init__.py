"""Evaluation of encoders: MTEB, offline suites, word-level tasks, statistics and a report."""
