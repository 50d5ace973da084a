"""transformers and sentence-transformers."""

from collections.abc import Sequence

import numpy as np
import torch

from contenders import Job, Run
from contenders.padded import in_sorted_batches


def transformers(job: Job) -> Run:
    """Padded batches sorted by length, SDPA attention, mean over real tokens. Its float32 is everyone's reference."""
    from transformers import AutoModel

    torch.set_num_threads(job.threads)
    model = AutoModel.from_pretrained(job.folder, attn_implementation="sdpa", dtype=getattr(torch, job.dtype)).eval()

    @torch.inference_mode()
    def batch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        real = torch.from_numpy(mask)
        hidden = model(input_ids=torch.from_numpy(ids), attention_mask=real, use_cache=False).last_hidden_state
        return ((hidden.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)).numpy()

    return in_sorted_batches(batch, job)


def sentence_transformers(job: Job) -> Run:
    """As its users call it: `encode` with its own sorting."""
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(job.threads)
    model = SentenceTransformer(str(job.folder), device="cpu", model_kwargs={"dtype": getattr(torch, job.dtype)})

    def run(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), batch_size=job.setting.batch, show_progress_bar=False))

    return run
