"""Which engine answers for a model id, and whether its vectors are right."""

from unmask.router.catalogue_sync import Follower, answering, retired
from unmask.router.registry import Models, ServedModel

__all__ = ["Follower", "Models", "ServedModel", "answering", "retired"]
