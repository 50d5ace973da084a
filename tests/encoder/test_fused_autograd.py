"""Gradients of a layer's element-wise parts: those of plain autograd, whatever the precision and shape."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.encoder.model.fused_autograd import RmsNorm, Rotate, SwiGlu


def tensor(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = tensor(99, *result.shape).to(result.dtype)
    return torch.autograd.grad((result * weights).sum(), inputs)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), tokens=st.integers(1, 9), half=st.integers(1, 17), scale=st.sampled_from([0.01, 1, 90])
)
def test_gradients_are_those_of_plain_autograd(seed: int, tokens: int, half: int, scale: float) -> None:
    x = tensor(seed, tokens, 2 * half, scale=scale).float().requires_grad_()
    weight = tensor(seed + 1, 2 * half).float().requires_grad_()
    own, plain = RmsNorm.apply(x, weight, 1e-5), F.rms_norm(x, (2 * half,), weight, 1e-5)
    assert isinstance(own, Tensor)
    torch.testing.assert_close(own, plain)
    for a, b in zip(gradients(own, x, weight), gradients(plain, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    gate, up = x.chunk(2, dim=-1)
    own, plain = SwiGlu.apply(x), F.silu(gate) * up
    assert isinstance(own, Tensor)
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(gradients(own, x), gradients(plain, x), rtol=1e-4, atol=1e-5 * scale)
    heads = tensor(seed, tokens, 3, 2 * half).float().requires_grad_()
    angles = tensor(seed + 2, tokens, 1, half).float()
    own, plain = Rotate.apply(heads, angles.cos(), angles.sin()), plain_rotation(heads, angles.cos(), angles.sin())
    assert isinstance(own, Tensor)
    torch.testing.assert_close(own, plain)
    torch.testing.assert_close(gradients(own, heads), gradients(plain, heads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_near_float32_and_keeps_its_type(dtype: torch.dtype) -> None:
    wide = tensor(1, 6, 32).float().requires_grad_()
    narrow = wide.detach().to(dtype).requires_grad_()
    weight = tensor(2, 32).float()
    angles = tensor(3, 6, 1, 16).float()
    for function in (
        lambda x: RmsNorm.apply(x, weight, 1e-5),
        lambda x: SwiGlu.apply(x),
        lambda x: Rotate.apply(x[:, None], angles.cos(), angles.sin()),
    ):
        reference, result = function(wide), function(narrow)
        assert isinstance(reference, Tensor)
        assert isinstance(result, Tensor)
        assert result.dtype == dtype
        (expected,), (gradient,) = gradients(reference, wide), gradients(result, narrow)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), expected, rtol=0.05, atol=0.05)


def test_a_weight_that_is_frozen_gets_no_gradient() -> None:
    x, weight = tensor(1, 3, 8).float().requires_grad_(), tensor(2, 8).float()
    (gradient,) = gradients(RmsNorm.apply(x, weight, 1e-5), x)  # pyright: ignore[reportArgumentType]
    assert gradient.shape == x.shape
    assert weight.grad is None
