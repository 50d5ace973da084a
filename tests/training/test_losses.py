"""Compare the losses with formulas written out, and check properties that hold for any vectors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.tiny import CPU
from unmask.training.losses import false_negatives, info_nce, matryoshka, same_text, similarity_loss


def vectors(rows: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_negative_nll(queries: Tensor, positives: Tensor, negatives: Tensor | None, scale: float) -> Tensor:
    """LLM2Vec's HardNegativeNLLLoss, one process. llm2vec/loss/HardNegativeNLLLoss.py at v0.2.3."""
    documents = positives if negatives is None else torch.cat([positives, negatives])
    scores = torch.stack([torch.stack([F.cosine_similarity(q, d, dim=0) for d in documents]) for q in queries]) * scale
    return F.cross_entropy(scores, torch.arange(len(queries)))


@pytest.mark.parametrize("negatives", [0, 6, 9])
def test_info_nce_is_llm2vecs_loss(negatives: int) -> None:
    q, p = vectors(6), vectors(6, seed=1)
    n = vectors(negatives, seed=2) if negatives else None
    candidates = p if n is None else torch.cat([p, n])
    assert float(info_nce(q, candidates, 0.02)) == pytest.approx(float(hard_negative_nll(q, p, n, 50.0)), rel=1e-9)


def test_both_ways_is_the_mean_of_the_two_directions() -> None:
    q, p, n = vectors(5), vectors(5, seed=1), vectors(3, seed=2)
    there = info_nce(q, torch.cat([p, n]), 0.05)
    back = info_nce(p, q, 0.05)
    assert float(info_nce(q, torch.cat([p, n]), 0.05, both_ways=True)) == pytest.approx(float(there + back) / 2)


def test_a_masked_candidate_is_as_if_it_were_not_there() -> None:
    q, p, n = vectors(4), vectors(4, seed=1), vectors(2, seed=2)
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[:, 5] = True
    masked[range(4), range(4)] = True  # its own positive never is masked
    expected = info_nce(q, torch.cat([p, n[:1]]), 0.05)
    assert float(info_nce(q, torch.cat([p, n]), 0.05, masked)) == pytest.approx(float(expected))
    assert masked[0, 0], "the caller's mask is left alone"
    alone = info_nce(q, torch.cat([p, n]), 0.05, torch.ones(4, 6, dtype=torch.bool), both_ways=True)
    assert float(alone) == pytest.approx(0.0)


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 1000), st.floats(0.1, 10.0))
def test_info_nce_knows_no_order_and_no_length(queries: int, negatives: int, seed: int, scale: float) -> None:
    q, p, n = (vectors(rows, seed=seed + i) for i, rows in enumerate((queries, queries, negatives)))
    loss = info_nce(q, torch.cat([p, n]), 0.1)
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(seed))
    moved = info_nce(q[order] * scale, torch.cat([p[order], n.flip(0)]), 0.1)
    assert float(moved) == pytest.approx(float(loss), abs=1e-9)
    assert float(loss) >= 0
    more = info_nce(q, torch.cat([p, n, vectors(1, seed=seed + 9)]), 0.1)
    assert float(more) >= float(loss)  # a further negative never makes it easier


def test_false_negatives_are_nearer_than_the_positive_less_the_margin() -> None:
    angles = torch.tensor([0.0, 30.0, 10.0, 33.0, 60.0]).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    query, candidates = points[:1], points[1:]  # the positive at 30 degrees; 10 is nearer, 33 a little farther
    assert false_negatives(query, candidates, 0.0).tolist() == [[False, True, False, False]]
    assert false_negatives(query, candidates, 0.05).tolist() == [[True, True, True, False]]
    assert false_negatives(query * 3, candidates * 7, 0.05).tolist() == [[True, True, True, False]]


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 100), st.floats(-0.5, 0.5), st.floats(0.0, 0.5))
def test_a_larger_margin_masks_more(queries: int, more: int, seed: int, margin: float, step: float) -> None:
    q, c = vectors(queries, seed=seed), vectors(queries + more, seed=seed + 1)
    assert not (false_negatives(q, c, margin) & ~false_negatives(q, c, margin + step)).any()


def test_copies_of_the_query_or_its_positive_are_no_negatives() -> None:
    mask = same_text(["q1", "q2", "q3"], ["p1", "p2", "p1", "q2", "n"], CPU)
    assert mask.tolist() == [
        [True, False, True, False, False],
        [False, True, False, True, False],
        [True, False, True, False, False],
    ]


@settings(max_examples=25)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), st.lists(st.sampled_from("abcd"), max_size=3))
def test_same_text_is_string_equality(positives: list[str], negatives: list[str]) -> None:
    queries, candidates = ["a"] * len(positives), positives + negatives
    expected = [[c in ("a", positives[i]) for c in candidates] for i in range(len(queries))]
    assert same_text(queries, candidates, CPU).tolist() == expected


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(0, 100))
def test_a_student_that_sees_the_teachers_similarities_has_nothing_to_learn(rows: int, seed: int) -> None:
    teacher = vectors(rows, 5, seed)
    rotation = torch.linalg.qr(vectors(12, 12, seed + 1))[0][:5]  # another orientation, other length and width
    student = ((teacher * 3.0) @ rotation).requires_grad_()
    loss = similarity_loss(student, teacher, 0.05, 1.0, 10.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-9)
    loss.backward()
    assert student.grad is not None
    assert float(student.grad.norm()) < 1e-6
    if rows > 2:  # any others have; with three rows the similarities may be nearly the same by chance
        assert float(similarity_loss(vectors(rows, 5, seed + 2), teacher, 0.05, 1.0, 0.0)) > 1e-6
        assert float(similarity_loss(vectors(rows, 5, seed + 2), teacher, 0.05, 0.0, 1.0)) > 1e-6


def test_distillation_is_the_divergence_written_out() -> None:
    student, teacher = vectors(4), vectors(4, 6, 1)
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        p, q = (
            torch.stack([F.cosine_similarity(v[i], v[j], dim=0) for j in others]).div(0.1).softmax(dim=0)
            for v in (student, teacher)
        )
        expected += float((q * (q / p).log()).sum()) / 4
    assert float(similarity_loss(student, teacher, 0.1, 1.0, 0.0)) == pytest.approx(expected)


def test_one_text_alone_has_no_similarities_and_still_a_gradient() -> None:
    student = vectors(1).requires_grad_()
    similarity_loss(student, vectors(1, 3), 0.1, 1.0, 1.0).backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_matryoshka_is_the_mean_over_the_lengths_below_the_whole() -> None:
    v = vectors(4)
    loss = matryoshka(lambda cut: cut.sum(), v, [2, 4, 8, 100])
    assert float(loss) == pytest.approx(float(v.sum() + v[:, :2].sum() + v[:, :4].sum()) / 3)
    assert float(matryoshka(lambda cut: cut.sum(), v, [])) == pytest.approx(float(v.sum()))
