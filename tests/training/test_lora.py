"""Adapters: the same vectors in training, after loading, and in PEFT; the gradients of the plain two paths."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.training.tiny import CPU, GOLDEN, distance, gradients, off_start, recipe_of, texts_of, write_decoder
from unmask.encoder import Encoder
from unmask.errors import StorageError, UnmaskError, UsageError
from unmask.training.lora import LoraLinear, adapter_tensors, write_adapter
from unmask.training.recipe import ALL_LINEAR, Lora, Recipe
from unmask.training.training_model import TrainingModel

TEXTS = texts_of(9)
BASES = ("tiny_llama", "tiny_gemma", "tiny_llama3_instruct", "qwen2")
SUBSETS = {"all": list(ALL_LINEAR), "q and v": ["q_proj", "v_proj"], "some": ["k_proj", "o_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory):
    """A golden model, or a random Qwen2, which has biases."""
    qwen2 = write_decoder(tmp_path_factory.mktemp("models") / "qwen2")
    return lambda name: str(qwen2 if name == "qwen2" else GOLDEN / name)


def trained(model: TrainingModel, steps: int = 3) -> TrainingModel:
    """A few real steps on a loss that every parameter has a part in."""
    adamw = torch.optim.AdamW(model.parameters.values(), lr=1e-2)
    prompts = model.prompts(TEXTS, "")
    for step in range(steps):
        model.decoder.train()
        torch.manual_seed(step)
        vectors = F.normalize(model.vectors(prompts), dim=1)
        (vectors @ vectors.T).mean().backward()
        adamw.step()
        adamw.zero_grad()
        model.merge()
    model.decoder.eval()
    model.merge()
    return model


def far(a: object, b: object) -> float:
    one, other = torch.as_tensor(a).detach(), torch.as_tensor(b).detach()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", BASES)
def test_the_saved_adapter_gives_the_trained_vectors(name: str, subset: str, dropout: float, base_of, tmp_path: Path):
    base = base_of(name)
    lora = {"rank": 4, "alpha": 12.0, "dropout": dropout, "targets": SUBSETS[subset]}
    recipe = recipe_of(base=base, lora=lora)
    model = TrainingModel(recipe, CPU)
    before = Encoder.load(base).encode(TEXTS)
    model.decoder.eval()
    model.merge()
    assert far(model.encoder.encode(TEXTS), before) < 1e-5  # B is zero: training begins at the base
    mine = trained(model).encoder.encode(TEXTS)
    assert far(mine, before) > 0.01
    assert recipe.lora is not None
    write_adapter(tmp_path / "adapter", adapter_tensors(model.adapted), recipe.lora, base, torch.float32)
    modes = {(tmp_path / "adapter" / f"adapter_{name}").stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # what another user may read of it, he may read all of
    assert far(Encoder.load(base, adapters=[tmp_path / "adapter"]).encode(TEXTS), mine) < 1e-5
    assert far(Encoder.load(tmp_path / "adapter").encode(TEXTS), mine) < 1e-5
    modules = {key.split(".")[-3] for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert modules == set(SUBSETS[subset])


def saved(recipe: Recipe, folder: Path) -> TrainingModel:
    """Train for a moment and write the adapter."""
    model = trained(TrainingModel(recipe, CPU))
    assert recipe.lora is not None
    write_adapter(folder, adapter_tensors(model.adapted), recipe.lora, recipe.base, torch.float32)
    return model


@pytest.mark.parametrize("alpha", [12.0, 5.0])
def test_training_goes_on_from_an_adapter(alpha: float, tmp_path: Path) -> None:
    first = saved(recipe_of(lora={"rank": 4, "alpha": 12.0}), tmp_path / "first")
    further = recipe_of(lora={"rank": 4, "alpha": alpha, "init_from": str(tmp_path / "first")})
    second = TrainingModel(further, CPU)
    second.decoder.eval()
    second.merge()
    assert far(second.encoder.encode(TEXTS), first.encoder.encode(TEXTS)) < 1e-5  # begins where the first one ended
    mine = trained(second).encoder.encode(TEXTS)
    assert far(mine, first.encoder.encode(TEXTS)) > 0.01
    assert further.lora is not None
    write_adapter(tmp_path / "second", adapter_tensors(second.adapted), further.lora, further.base, torch.float32)
    # The second adapter is the whole difference from the base: it replaces the first, and does not lie on it.
    assert far(Encoder.load(tmp_path / "second").encode(TEXTS), mine) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "rank 4"),
        ({"targets": ["q_proj", "v_proj"]}, "only .* adapts layers.0.mlp.down_proj"),
        ({"init_from": str(GOLDEN / "tiny_llama")}, "a whole model, not an adapter"),
        ({"init_from": "nowhere/at/all"}, "no model at nowhere/at/all"),
    ],
)
def test_an_adapter_that_cannot_be_trained_further_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    saved(recipe_of(lora={"rank": 4}), tmp_path / "first")
    with pytest.raises(UnmaskError, match=message):
        TrainingModel(recipe_of(lora={"rank": 4, "init_from": str(tmp_path / "first"), **change}), CPU)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    saved(recipe_of(base=str(GOLDEN / "tiny_gemma"), lora={"rank": 4}), tmp_path / "first")
    with pytest.raises(UsageError, match=r"was trained on .*tiny_gemma, not on this run's base .*tiny_llama"):
        TrainingModel(recipe_of(lora={"rank": 4, "init_from": str(tmp_path / "first")}), CPU)


@pytest.mark.parametrize("subset", ["all", "q and v"])
def test_peft_reads_the_adapter(subset: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = GOLDEN / "tiny_llama3_instruct"
    recipe = recipe_of(base=str(base), lora={"rank": 4, "alpha": 12.0, "targets": SUBSETS[subset]})
    model = trained(TrainingModel(recipe, CPU))
    assert recipe.lora is not None
    write_adapter(tmp_path / "adapter", adapter_tensors(model.adapted), recipe.lora, str(base), torch.float32)
    config = transformers.AutoConfig.from_pretrained(base)
    config.is_causal = False
    inner = transformers.AutoModel.from_pretrained(base, config=config, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(inner, tmp_path / "adapter").eval()
    with torch.no_grad():
        for prompt in model.prompts(TEXTS[:3], ""):
            ids = torch.from_numpy(prompt.ids)
            states = theirs(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            assert far(model.hidden([prompt.ids]), states) < 1e-5


def linear_of(bias: bool, parts: list[tuple[int, int]], dropout: float = 0.0) -> LoraLinear:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, bias=bias)
    named = [(f"layers.0.part{i}", start, stop) for i, (start, stop) in enumerate(parts)]
    adapted = LoraLinear(linear, named, Lora(rank=3, alpha=6.0, dropout=dropout), torch.float32)
    with torch.no_grad():
        for up in adapted.up:
            up.normal_()
    adapted.merge()
    return adapted


def two_paths(adapted: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer as LoRA's paper writes it, in float64."""
    y = x @ adapted.frozen.double().T
    if adapted.bias is not None:
        y = y + adapted.bias.double()
    added = torch.zeros_like(y)
    for (_, start, stop), a, b in zip(adapted.parts, adapted.down.split(adapted.rank), adapted.up, strict=True):
        added = added + F.pad(x @ a.double().T @ b.double().T * adapted.scale, (start, 20 - stop))
    return y + added


PARTS = {
    "whole": [(0, 20)],
    "three": [(0, 8), (8, 14), (14, 20)],
    "first and last": [(0, 8), (14, 20)],
    "middle": [(8, 14)],
}


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the second takes the paths apart, and drops nothing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_gradients_are_those_of_the_two_paths(parts: str, bias: bool, dropout: float) -> None:
    adapted = linear_of(bias, PARTS[parts], dropout)
    x = torch.randn(7, 12, requires_grad=True)
    target = torch.randn(7, 20)
    inputs = [x, adapted.down, *adapted.up]
    mine, plain = adapted(x), two_paths(adapted, x.double())
    torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((mine * target).sum(), inputs)
    expected = torch.autograd.grad((plain * target.double()).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_dropout_falls_on_the_adapter_alone() -> None:
    adapted = linear_of(True, PARTS["three"], dropout=0.5)
    x = torch.randn(200, 12)
    dropped, whole = adapted(x), two_paths(adapted, x.double())
    assert far(dropped, whole.float()) > 0.1
    mean = torch.stack([adapted(x) for _ in range(400)]).mean(dim=0)
    assert float((mean - whole).norm() / whole.norm()) < 0.1
    adapted.eval()
    adapted.merge()
    assert far(adapted(x), whole.float()) < 1e-5


def test_recomputed_activations_give_the_same_gradients() -> None:
    computed = []
    for checkpointing in (False, True):
        model = off_start(TrainingModel(recipe_of(gradient_checkpointing=checkpointing), CPU))
        model.decoder.train()
        model.vectors(model.prompts(TEXTS, "")).square().sum().backward()
        computed.append(gradients(model))
    assert distance(*computed) < 1e-6


def test_only_the_adapter_is_trained() -> None:
    model = TrainingModel(recipe_of(), CPU)
    frozen = {name: tensor.clone() for name, tensor in model.decoder.named_parameters() if not tensor.requires_grad}
    whole = [linear.frozen.clone() for linear in model.adapted]
    assert set(model.parameters) == {
        f"layers.{i}.{part}"
        for i in range(3)
        for part in (
            *("qkv.down", "qkv.up.0", "qkv.up.1", "qkv.up.2", "out.down", "out.up.0"),
            *("gate_up.down", "gate_up.up.0", "gate_up.up.1", "down.down", "down.up.0"),
        )
    }
    trained(model)
    assert all(torch.equal(dict(model.decoder.named_parameters())[name], was) for name, was in frozen.items())
    assert all(torch.equal(linear.frozen, was) for linear, was in zip(model.adapted, whole, strict=True))


def test_half_precision_trains_float32_adapters() -> None:
    model = TrainingModel(recipe_of(precision="bfloat16"), CPU)
    assert {p.dtype for p in model.parameters.values()} == {torch.float32}
    assert model.decoder.embedding.weight.dtype == torch.bfloat16
    before = model.parameters["layers.0.qkv.down"].clone()
    trained(model)
    assert not torch.equal(model.parameters["layers.0.qkv.down"], before)
    assert all(torch.isfinite(p).all() for p in model.parameters.values())


def test_an_adapter_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    recipe = recipe_of()
    model = TrainingModel(recipe, CPU)
    assert recipe.lora is not None
    with pytest.raises(StorageError, match="cannot write"):
        write_adapter(
            tmp_path / "file" / "below", adapter_tensors(model.adapted), recipe.lora, recipe.base, torch.float32
        )
