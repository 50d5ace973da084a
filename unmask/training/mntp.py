"""Masked next-token prediction (LLM2Vec, arXiv 2404.05961, section 2.2).

A masked token at position i is predicted from the state at i - 1, through the decoder's own language-model head, as
the decoder was trained to predict. Only those states go through the head, a chunk at a time, so that the logits of a
step are never in memory all at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.checkpoint.checkpoint import Checkpoint
from unmask.checkpoint.tensors import LM_HEAD
from unmask.encoder.model.decoder import Decoder
from unmask.errors import UsageError
from unmask.training.recipe import Mntp
from unmask.training.training_model import TrainingModel

# Logits of one chunk: 512 x 128k vocabulary in float32 is 256 MB.
_CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class MaskedSequence:
    """A sequence with masked tokens.

    Attributes:
        ids: what the model reads, int64 [L].
        positions: masked positions, ascending, never 0 (no state comes before it), int64 [M].
        targets: the original tokens at these positions, int64 [M].
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


def mask_tokens(
    ids: np.ndarray, mntp: Mntp, mask_id: int, vocabulary: int, generator: np.random.Generator
) -> MaskedSequence:
    """Mask tokens at random, as BERT does (80 % mask token, 10 % random, 10 % unchanged) or all by the mask token.

    At least one token of a sequence of two or more is masked.
    """
    chosen = generator.random(len(ids)) < mntp.probability
    chosen[0] = False
    if len(ids) > 1 and not chosen.any():
        chosen[generator.integers(1, len(ids))] = True
    positions = np.flatnonzero(chosen)
    read = ids.copy()
    if mntp.masking == "all":
        read[positions] = mask_id
    else:
        fate = generator.random(len(positions))
        read[positions[fate < 0.8]] = mask_id
        random = positions[(fate >= 0.8) & (fate < 0.9)]
        read[random] = generator.integers(0, vocabulary, len(random))
    return MaskedSequence(read, positions, ids[positions])


def blocks(sequences: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Cut each document into blocks of at most `length` tokens. Blocks of one token are dropped: nothing to predict."""
    pieces = (ids[start : start + length] for ids in sequences for start in range(0, len(ids), length))
    return [piece for piece in pieces if len(piece) > 1]


def mask_token_id(checkpoint: Checkpoint, mntp: Mntp) -> int:
    """Return the id of the mask token.

    Raises:
        UsageError: the tokenizer has no such single token.
    """
    token = checkpoint.tokenizer.text.token_to_id(mntp.mask_token)
    if token is None:
        raise UsageError(f"mntp.mask_token={mntp.mask_token!r} is not one token of {checkpoint.name}'s vocabulary")
    return token


@dataclass(frozen=True)
class LanguageModelHead:
    """The language-model head.

    Attributes:
        own: its matrix [vocabulary, W]; None where the base ties it to the embedding.
        embedding: the decoder's.
        cap: logit soft cap, as in Gemma 2: logits lie in (-cap, cap). None for no cap.
    """

    own: Tensor | None
    embedding: nn.Embedding
    cap: float | None

    @property
    def weight(self) -> Tensor:
        """[vocabulary, W]. Read at each use: a sharded embedding is gathered only between forward and backward."""
        return self.embedding.weight if self.own is None else self.own


def language_model_head(model: TrainingModel) -> LanguageModelHead:
    """Read the base's own language-model head. It is frozen, unless it is the embedding and that is trained.

    Raises:
        UsageError: the base is an inner model, whose head is elsewhere.
    """
    checkpoint, decoder = model.encoder.checkpoint, model.decoder
    assert isinstance(decoder, Decoder)
    cap = checkpoint.config.get("final_logit_softcapping")
    tied = checkpoint.config.get("tie_word_embeddings")
    if LM_HEAD in checkpoint.tensors.names() and not tied:
        own = checkpoint.tensors.read(LM_HEAD).to(model.device, model.dtype)
    elif tied is False:
        raise UsageError(
            f"{model.encoder.name} has no language-model head ({LM_HEAD}) and its config ties none to the "
            "embedding, so there is nothing to predict tokens with; name the whole CausalLM as the base"
        )
    else:
        own = None
    return LanguageModelHead(own, decoder.embedding, float(cap) if cap else None)


def prediction_loss(states: Tensor, targets: Tensor, head: LanguageModelHead) -> Tensor:
    """Sum the cross-entropy of the targets, with the logits of one chunk in memory at a time.

    Args:
        states: [M, W], the state before each masked token.
        targets: [M].
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(states, head.weight, targets, head.cap)  # pyright: ignore[reportAssignmentType]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in chunks. The gradient of a chunk's logits is applied at once, so they can be freed."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        total = torch.zeros((), device=states.device)
        d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        cast = weight.to(states.dtype)
        for start in range(0, len(states), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            logits = F.linear(states[rows], cast).float()  # [m, V]
            slope = None
            if cap is not None:
                squashed = torch.tanh(logits / cap)
                logits, slope = cap * squashed, 1 - squashed.square()
            log_p = logits.log_softmax(dim=1)
            total += F.nll_loss(log_p, targets[rows], reduction="sum")
            d_logits = log_p.exp_()
            d_logits[torch.arange(len(d_logits), device=states.device), targets[rows]] -= 1
            if slope is not None:
                d_logits *= slope
            d_logits = d_logits.to(states.dtype)
            if d_states is not None:
                d_states[rows] = d_logits @ cast
            if d_weight is not None:
                d_weight += (d_logits.T @ states[rows]).float()
        ctx.save_for_backward(*(d for d in (d_states, d_weight) if d is not None))
        ctx.needs_gradient = (d_states is not None, d_weight is not None)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = list(ctx.saved_tensors)
        d_states = saved.pop(0) * d_total if ctx.needs_gradient[0] else None
        d_weight = (saved.pop(0) * d_total).to(ctx.weight_dtype) if ctx.needs_gradient[1] else None
        return d_states, d_weight, None, None
