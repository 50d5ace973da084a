"""The transformer: architectures as data, one bidirectional forward, attention, and a fallback to `transformers`."""
