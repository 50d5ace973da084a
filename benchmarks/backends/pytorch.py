"""transformers and sentence-transformers."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from backends import Job, Run
from backends.padded import in_sorted_batches


def transformers(job: Job) -> Run:
    """Padded batches sorted by length, mean over real tokens. Its float32 is everyone's reference."""
    from transformers import AutoModel

    torch.set_num_threads(job.threads)
    model = AutoModel.from_pretrained(job.folder, **_options(job)).to(job.device).eval()

    @torch.inference_mode()
    def batch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        real, tokens = (torch.from_numpy(numbers).to(job.device) for numbers in (mask, ids))
        hidden = model(input_ids=tokens, attention_mask=real, use_cache=False).last_hidden_state
        return ((hidden.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)).cpu().numpy()

    return in_sorted_batches(batch, job)


def sentence_transformers(job: Job) -> Run:
    """Load sentence-transformers; `encode` sorts the texts itself."""
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(job.threads)
    model = SentenceTransformer(str(job.folder), device=job.device, model_kwargs=_options(job))

    def run(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), batch_size=job.setting.batch, show_progress_bar=False))

    return run


def _options(job: Job) -> dict[str, Any]:
    """Options for loading: flash-attn where it is installed and fits, else torch's own attention."""
    flash = job.device != "cpu" and job.dtype != "float32" and find_spec("flash_attn") is not None
    return {
        "dtype": getattr(torch, job.dtype),
        "attn_implementation": "flash_attention_2" if flash else "sdpa",
    }
