"""infinity-emb, in an environment of its own: its requirements end before the transformers that the others use."""

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # pyright: ignore[reportMissingImports]

from backends import Job, Run


def load(job: Job) -> Run:
    """Its engine without its HTTP, torch in float32, all texts handed over at once; it sorts and batches by itself."""
    torch.set_num_threads(job.threads)
    loop = asyncio.new_event_loop()
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=str(job.folder),
            engine="torch",
            device="cpu",
            dtype="float32",
            batch_size=job.setting.batch,
            bettertransformer=False,
            model_warmup=False,
            lengths_via_tokenize=True,
        )
    )
    loop.run_until_complete(engine.astart())

    def run(texts: Sequence[str]) -> np.ndarray:
        vectors, _ = loop.run_until_complete(engine.embed(sentences=list(texts)))
        return np.stack(vectors)

    return run
