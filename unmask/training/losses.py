"""Losses of a batch of vectors: InfoNCE, distillation, and both on truncated (Matryoshka) vectors.

Letters in shape comments:
    Q  queries     M  hard negatives of the batch, all queries' together     C = Q + M  candidates     W  dimensions
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    queries: Tensor, candidates: Tensor, temperature: float, masked: Tensor | None = None, both_ways: bool = False
) -> Tensor:
    """InfoNCE: cross-entropy of finding each query's own positive (arXiv 1807.03748; LLM2Vec's HardNegativeNLLLoss).

    Args:
        queries: [Q, W].
        candidates: [C, W]; row i < Q is the positive of query i, the rest are hard negatives.
        temperature: of the cosines; LLM2Vec's scale of 50 is 0.02.
        masked: [Q, C] bool, candidates that do not count as negatives of a query. Its own positive is never masked.
        both_ways: average with the loss of finding each positive's query.

    Returns:
        A scalar, the mean over queries.
    """
    count = len(queries)
    scores = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T / temperature  # [Q, C]
    own = torch.arange(count, device=scores.device)
    if masked is not None:
        masked = masked.clone()
        masked[own, own] = False
        scores = scores.masked_fill(masked, float("-inf"))
    loss = F.cross_entropy(scores, own)
    if both_ways:
        loss = (loss + F.cross_entropy(scores[:, :count].T, own)) / 2
    return loss


def false_negatives(judge_queries: Tensor, judge_candidates: Tensor, margin: float) -> Tensor:
    """Mark candidates that are too similar to a query to count as negatives: nearer than its positive less `margin`.

    Positive-aware filtering as in NV-Retriever (arXiv 2407.15831), inside the batch.

    Args:
        judge_queries, judge_candidates: vectors that judge, [Q, W] and [C, W]: the teacher's, or the model's own.
        margin: cosine.

    Returns:
        [Q, C] bool.
    """
    with torch.no_grad():
        cosines = F.normalize(judge_queries, dim=1) @ F.normalize(judge_candidates, dim=1).T  # [Q, C]
        positive = cosines.diagonal()[: len(judge_queries)].unsqueeze(1)  # [Q, 1]
        return cosines > positive - margin


def same_text(queries: Sequence[str], candidates: Sequence[str], device: torch.device) -> Tensor:
    """Mark candidates that are the query's own text or a copy of its positive, which are no negatives: [Q, C] bool."""
    numbers: dict[str, int] = {}
    query, candidate = (
        torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts], device=device)
        for texts in (queries, candidates)
    )
    positive = candidate[: len(query)]
    return (candidate[None] == query[:, None]) | (candidate[None] == positive[:, None])


def similarity_loss(
    vectors: Tensor, teacher: Tensor, temperature: float, weight: float, similarity_weight: float
) -> Tensor:
    """Distillation loss: the difference between the similarities within a batch and the teacher's.

    For each text, the Kullback-Leibler divergence of its similarity distribution over the other texts from the
    teacher's (relational distillation, arXiv 1904.05068; with a softmax as in CKD, arXiv 2010.12841), and the squared
    error of the cosines. The two models may have vectors of different lengths and orientations.

    Args:
        vectors: [N, W] of the student. teacher: [N, W'].
        temperature: of both distributions.
        weight, similarity_weight: of the two terms.

    Returns:
        A scalar.
    """
    if len(vectors) < 2:
        return vectors.sum() * 0.0  # one text alone has no similarities
    student = F.normalize(vectors, dim=1)
    student = student @ student.T  # [N, N]
    with torch.no_grad():
        target = F.normalize(teacher, dim=1)
        target = target @ target.T  # [N, N]
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    loss = vectors.new_zeros(())
    if weight:
        pair = (x[others].view(len(vectors), -1) / temperature for x in (student, target))  # [N, N-1] twice
        log_p, log_q = (F.log_softmax(x, dim=1) for x in pair)
        loss = loss + weight * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if similarity_weight:
        loss = loss + similarity_weight * F.mse_loss(student[others], target[others])
    return loss


def vector_distance(vectors: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - cosine between each vector [N, w] and the first w numbers of its target [N, W].

    Raises:
        ValueError: vectors are longer than targets.
    """
    if vectors.shape[1] > targets.shape[1]:
        raise ValueError(f"vectors of {vectors.shape[1]} numbers have no target of {targets.shape[1]}")
    targets = targets[:, : vectors.shape[1]]
    return 1 - F.cosine_similarity(vectors, targets, dim=1).mean()


def ranking(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Ranking loss: Kullback-Leibler divergence of each query's distribution over the candidates from the teacher's.

    Args:
        scores, teacher: cosines [Q, C] of the student and of the teacher.
    """
    log_p, log_q = (F.log_softmax(x / temperature, dim=1) for x in (scores, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def matryoshka(loss: Callable[[Tensor], Tensor], vectors: Tensor, lengths: Sequence[int]) -> Tensor:
    """Average a loss over the full vectors and over each shorter length (arXiv 2205.13147).

    Args:
        loss: takes vectors [N, w] of any length w.
        vectors: [N, W].
        lengths: the shorter lengths; those not below W are left out.
    """
    cuts = [vectors, *(vectors[:, :length] for length in lengths if length < vectors.shape[1])]
    return torch.stack([loss(cut) for cut in cuts]).mean()
