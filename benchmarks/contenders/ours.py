"""unmask, by its own door."""

from typing import Any

import torch

from contenders import LONGEST, Job, Run
from unmask import Encoder


def load(job: Job) -> Run:
    """`Encoder.encode`, which sorts and packs by itself."""
    torch.set_num_threads(job.threads)
    dtype: Any = job.dtype
    encoder = Encoder.load(job.folder, dtype=dtype, device=job.device, max_length=LONGEST)
    return lambda texts: encoder.encode(list(texts))
