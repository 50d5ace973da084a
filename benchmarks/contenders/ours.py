"""unmask, by its own door."""

import torch

from contenders import LONGEST, Job, Run
from unmask import Encoder


def load(job: Job) -> Run:
    """`Encoder.encode`, which sorts and packs by itself."""
    torch.set_num_threads(job.threads)
    encoder = Encoder.load(job.folder, dtype=job.dtype, max_length=LONGEST)  # pyright: ignore[reportArgumentType]
    return lambda texts: encoder.encode(list(texts))
