"""How good an encoder is: MTEB, offline suites, word-level tasks, and a report a person can look at."""
