"""The fork server of the tests: a process that has imported torch, so that one forked from it starts in no time.

Python has one for each process, and fixes its imports when it starts: all tests share this list.
"""

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

# Not modules of the tests: the fork server does not see the folders that pytest adds to the path, and skips without a
# word the modules that it does not find. torch._dynamo: each optimiser imports it, for half a second.
_MODULES = [
    "torch._dynamo",
    "torch.distributed",
    "unmask.bulk.job",
    "unmask.encoder.encoder",
    "unmask.training.model_folder",
    "unmask.training.train",
]


def fork_server() -> ForkServerContext:
    """`fork_server().Process(...)` starts at once, and knows nothing of this process but its arguments."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context
