"""Serve many callers with one model: fair queue, packs by token budget, deadlines, back-pressure."""

from unmask.engine.engine import Engine

__all__ = ["Engine"]
