"""Pages for one person: sign-in, keys, usage, ledger, settings and votes for models."""
