"""Many callers, one model: queue, token-budget packs, deadlines, back-pressure."""

from unmask.engine.engine import Engine
from unmask.engine.models import Models, ServedModel

__all__ = ["Engine", "Models", "ServedModel"]
