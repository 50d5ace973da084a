"""Float32 master weights under 16-bit GEMMs."""

from pathlib import Path

import pytest
import torch

from tests.training.tiny import write_decoder
from unmask.encoder import Encoder
from unmask.encoder.model.decoder import Decoder
from unmask.training.master_weights import MasterLinear, use_master_weights

IDS, LENGTHS = torch.tensor([5, 9, 3, 7, 11, 2, 8]), [4, 3]


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    decoder = Encoder.load(write_decoder(tmp_path / "base")).trainable_decoder()
    assert isinstance(decoder, Decoder)
    return decoder.train()


def test_parameters_keep_their_names_and_precision(decoder: Decoder) -> None:
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    layers = use_master_weights(decoder, torch.bfloat16)
    assert len(layers) == 4 * len(decoder.layers)
    after = dict(decoder.named_parameters())
    assert after.keys() == before.keys()
    assert all(parameter.dtype == torch.float32 for parameter in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_gradients_are_float32_and_near_those_of_float32(decoder: Decoder) -> None:
    decoder(IDS, LENGTHS).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    use_master_weights(decoder, torch.bfloat16)
    decoder(IDS, LENGTHS).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        if name not in expected:
            continue
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert float(error) < 0.05, name


def test_gradients_of_several_packs_add_up_in_float32() -> None:
    layer = MasterLinear(torch.nn.Linear(4, 2, bias=False), torch.bfloat16)
    for scale in (1.0, 2.0**-9):  # the second is below half a step of the first in bfloat16
        layer(torch.full((1, 4), scale)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((2, 4), 1.0 + 2.0**-9))


def test_the_copy_follows_when_it_is_refreshed() -> None:
    layer = MasterLinear(torch.nn.Linear(3, 3), torch.bfloat16)
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert not torch.equal(layer.copy, layer.weight.bfloat16())
    layer.refresh()
    assert torch.equal(layer.copy, layer.weight.bfloat16())
