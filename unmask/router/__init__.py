"""Which engine answers for a model id, and whether its vectors are right."""

from unmask.router.following import Follower, answering, retired
from unmask.router.models import Models, ServedModel

__all__ = ["Follower", "Models", "ServedModel", "answering", "retired"]
