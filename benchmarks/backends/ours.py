"""unmask through its public API, with the settings that the command line makes (`keep_few_products`)."""

from typing import Any

import torch

from backends import LONGEST, Job, Run
from unmask import Encoder
from unmask.cli import keep_few_products


def load(job: Job) -> Run:
    """`Encoder.encode`, which sorts and packs by itself."""
    keep_few_products()
    torch.set_num_threads(job.threads)
    dtype: Any = job.dtype
    encoder = Encoder.load(job.folder, dtype=dtype, device=job.device, max_length=LONGEST)
    return lambda texts: encoder.encode(list(texts))
