"""Many callers, one model: queue, token-budget packs, deadlines, back-pressure."""

from unmask.engine.engine import Engine

__all__ = ["Engine"]
