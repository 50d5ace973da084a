"""The offline suite: mteb's tasks over data in a local folder, so that the same harness runs without a network."""

from unmask.evaluate.local.examples import FETCH_ADVICE
from unmask.evaluate.local.tasks import LOCAL_TASKS, LocalTask

__all__ = ["FETCH_ADVICE", "LOCAL_TASKS", "LocalTask"]
