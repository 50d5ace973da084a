"""Distil several teachers into a sheared decoder with a head, from recipe to loaded model."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import gradients, recipe_of, texts_of, write_decoder, write_pairs
from unmask.checkpoint.tensors import EMBEDDING
from unmask.encoder import Encoder
from unmask.encoder.model.decoder import Decoder
from unmask.errors import AdapterMismatch, CheckpointError, UsageError
from unmask.training.distributed import Processes
from unmask.training.gradcache import backward_through
from unmask.training.losses import vector_distance
from unmask.training.merging import average, interpolate
from unmask.training.model_folder import int8_rows
from unmask.training.recipe import Recipe
from unmask.training.run_folder import RunFolder
from unmask.training.train import dev_sets_of, load_data, mixture_of, open_teachers, run_training
from unmask.training.training_model import TrainingModel

TEXTS = texts_of(12)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pairs, a teacher of width 32 and a student of width 32 with three layers."""
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    write_pairs(tmp_path, 120)
    write_decoder(tmp_path / "teacher")
    write_decoder(tmp_path / "student", num_hidden_layers=3)
    return tmp_path


def recipe_for(folder: Path, **fields: Any) -> Recipe:
    teacher = str(folder / "teacher")
    pairs = {"name": "pairs", "path": "pairs.tsv", "query": "query", "positive": "positive", "negatives": ["negative"]}
    settings: dict[str, Any] = {
        "base": str(folder / "student"),
        "layers": 2,
        "lora": None,
        "freeze_embedding": True,
        "head": {"dimensions": 24, "ridge": 100},
        "distillation": {
            "teachers": [{"model": teacher}, {"model": teacher, "prompt": "moon ", "weight": 0.5}],
            "dimensions": 24,
            "vector_weight": 10.0,
        },
        "data": [
            {**pairs, "held_out": 10},
            {"name": "texts", "path": "pairs.tsv", "text": "query", "use_labels": False},
        ],
        "batch": {"size": 8, "sets": 2},
        "contrastive": {"weight": 0.0},  # random pairs teach nothing
        "optimiser": {"lr": 1e-3},
        "checkpoint_every": 4,
    }
    return recipe_of(**{**settings, **fields})


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(output, 1).metrics() if "loss" in line]


def test_the_head_begins_as_the_best_linear_map_and_training_brings_it_nearer(folder: Path) -> None:
    recipe = recipe_for(folder, steps=40, optimiser={"lr": 1e-3}, evaluate_every=20)
    outcome = run_training(recipe, data=folder, output=folder / "run")
    scores = [line["scores"] for line in RunFolder(folder / "run", 1).metrics() if "scores" in line]
    untrained = run_training(
        recipe_for(folder, steps=1, optimiser={"lr": 1e-12}, evaluate_every=1), data=folder, output=folder / "none"
    ).scores["held-out cosine"]
    assert untrained > 80
    assert scores[-1]["held-out cosine"] > untrained + 1
    assert Encoder.load(outcome.folder).dim == 24


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("embedding", [True, False], ids=["whole", "layers-alone"])
def test_what_is_written_is_what_was_trained(folder: Path, precision: str, embedding: bool) -> None:
    recipe = recipe_for(folder, save={"precision": precision, "embedding": embedding}, steps=3)
    model = run_training(recipe, data=folder, output=folder / "run").folder
    file = load_file(folder / "run" / "model" / "model.safetensors")
    assert (EMBEDDING in file) == embedding
    assert (model / "tokenizer.json").is_file() == embedding
    trained = torch.load(folder / "run" / "checkpoints" / "step-00000003" / "state.pt")["parameters"]
    encoder = Encoder.load(folder / "run" / "model")
    largest = {"float32": 0.0, "bfloat16": 2**-8, "int8": 2**-7}[precision]
    for name, parameter in encoder.trainable_decoder().named_parameters():
        if name in trained:
            error = (parameter - trained[name]).abs().amax() / trained[name].abs().amax()
            assert float(error.detach()) <= largest, name
    assert encoder.head is not None and encoder.head.linear is not None
    assert torch.equal(encoder.head.linear.plain_weight(), trained["head.weight"])


def test_an_embedding_of_another_model_is_part_of_the_revision(folder: Path) -> None:
    recipe = recipe_for(folder, save={"embedding": False}, steps=1)
    run_training(recipe, data=folder, output=folder / "run")
    model = folder / "run" / "model"
    before = Encoder.load(model).checkpoint.revision
    assert json.loads((model / "config.json").read_text())["token_embedding_from"] == str(folder / "student")
    config = folder / "student" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert Encoder.load(model).checkpoint.revision != before
    (model / "config.json").write_text((model / "config.json").read_text().replace("student", "nobody"))
    with pytest.raises(Exception, match="nobody"):
        Encoder.load(model)


def test_a_run_resumes_to_the_digit_with_its_average(folder: Path) -> None:
    recipe = recipe_for(folder, steps=8, ema=0.7)
    run_training(recipe, data=folder, output=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, data=folder, output=folder / "cut", progress=_stop_after(6))
    run_training(recipe, data=folder, output=folder / "cut", resume=True)
    assert losses(folder / "cut") == losses(folder / "whole")
    assert (folder / "cut" / "model" / "model.safetensors").read_bytes() == (
        folder / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    assert (folder / "cut" / "model" / "head.safetensors").read_bytes() == (
        folder / "whole" / "model" / "head.safetensors"
    ).read_bytes()


def test_a_second_stage_keeps_head_and_space_by_the_targets_of_the_first(folder: Path) -> None:
    first = run_training(recipe_for(folder, steps=20), data=folder, output=folder / "first").folder
    settings = msgspec.to_builtins(recipe_for(folder).distillation) | {"targets": "first/targets.npz", "sample": 40}
    recipe = recipe_for(
        folder, base=str(first), layers=None, steps=1, optimiser={"lr": 1e-12}, evaluate_every=1, distillation=settings
    )
    run_training(recipe, data=folder, output=folder / "second")
    assert (folder / "second" / "targets.npz").read_bytes() == (folder / "first" / "targets.npz").read_bytes()
    vectors = [Encoder.load(model).encode(TEXTS) for model in (first, folder / "second" / "model")]
    assert np.allclose(*vectors, atol=1e-5)
    # Another rotation in the same place is another run.
    with np.load(folder / "first" / "targets.npz") as arrays:
        other = {name: array * 0.5 for name, array in arrays.items()}
    np.savez(folder / "first" / "targets.npz", **other)
    with pytest.raises(UsageError, match=r"distillation\.targets"):
        run_training(recipe, data=folder, output=folder / "second", resume=True)


def test_targets_of_other_teachers_or_lengths_are_refused(folder: Path) -> None:
    def refused(match: str, **fields: Any) -> None:
        distillation = {"teachers": [{"model": str(folder / "teacher")}], "dimensions": 24, "vector_weight": 10.0}
        with pytest.raises(UsageError, match=match):
            settings = {**distillation, **fields}
            recipe = recipe_for(folder, distillation=settings, head={"dimensions": settings["dimensions"]})
            run_training(
                recipe, data=folder, output=folder / f"{Path(settings['targets']).stem}-{settings['dimensions']}"
            )

    run_training(recipe_for(folder, steps=1), data=folder, output=folder / "first")
    refused(r"no file at .*nothing\.npz; name the targets\.npz", targets="nothing.npz")
    refused(r"fitted to teachers with \[32, 32\] numbers, and the recipe's have \[32\]", targets="first/targets.npz")
    both = {"teachers": [{"model": str(folder / "teacher")}] * 2, "dimensions": 16, "targets": "first/targets.npz"}
    refused("targets of 24 numbers, and distillation.dimensions asks for 16; set it to 24", **both)


def test_an_exit_is_a_shallower_model_of_its_own(folder: Path) -> None:
    recipe = recipe_for(folder, layers=3, exits=[{"layers": 1}, {"layers": 2, "weight": 0.25}], steps=30)
    run_training(recipe, data=folder, output=folder / "run")
    trained = torch.load(folder / "run" / "checkpoints" / "step-00000030" / "state.pt")["parameters"]
    (evaluation,) = [line for line in RunFolder(folder / "run", 1).metrics() if "scores" in line]
    whole = Encoder.load(folder / "run" / "model")
    for layers in (1, 2):
        shallow = Encoder.load(folder / "run" / f"model-{layers}-layers")
        decoder = shallow.trainable_decoder()
        assert isinstance(decoder, Decoder)
        assert len(decoder.layers) == layers
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter, dict(whole.trainable_decoder().named_parameters())[name]), name
        assert shallow.head is not None and shallow.head.linear is not None
        assert torch.equal(shallow.head.linear.plain_weight(), trained[f"head.exit{layers}.weight"])
        # The exit's own head reads its layer; the head of the full depth, on the same layer, does not.
        targets, own = _targets_and_vectors(folder, shallow)
        assert evaluation["exits"][str(layers)].keys() == evaluation["scores"].keys()
        assert evaluation["exits"][str(layers)] == _scores_of(shallow, folder, recipe)
        foreign = Encoder.load(folder / "run" / "model", layers=layers)
        assert (own * targets).sum(1).mean() > (foreign.encode(TEXTS, normalize=True) * targets).sum(1).mean()


def _scores_of(encoder: Encoder, folder: Path, recipe: Recipe) -> dict[str, Any]:
    sets, _ = load_data(recipe, folder, lambda _: None)
    teachers = open_teachers(recipe, sets, folder, RunFolder(folder / "run", 1), Processes())
    scores = dev_sets_of(recipe, sets, folder, teachers).scores(
        lambda texts, instruction: encoder.encode(list(texts), instruction=instruction, normalize=True)
    )
    return {name: pytest.approx(score, abs=0.01) for name, score in scores.items()}


def _targets_and_vectors(folder: Path, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    recipe = recipe_for(folder)
    sets, _ = load_data(recipe, folder, lambda _: None)
    teachers = open_teachers(recipe, sets, folder, RunFolder(folder / "run", 1), Processes())
    return teachers.targets(TEXTS), encoder.encode(TEXTS, normalize=True)


def test_an_exit_adds_its_weighted_loss(folder: Path) -> None:
    def first_loss(name: str, **fields: Any) -> float:
        run_training(recipe_for(folder, layers=3, steps=1, **fields), data=folder, output=folder / name)
        return losses(folder / name)[0]

    alone = first_loss("alone")
    half, whole = (first_loss(f"exit-{w}", exits=[{"layers": 2, "weight": w}]) for w in (0.5, 1.0))
    assert half > alone
    assert whole - alone == pytest.approx(2 * (half - alone), rel=1e-4)


def test_exits_resume_to_the_digit(folder: Path) -> None:
    recipe = recipe_for(folder, layers=3, exits=[{"layers": 1}], steps=6, ema=0.7)
    run_training(recipe, data=folder, output=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, data=folder, output=folder / "cut", progress=_stop_after(5))
    run_training(recipe, data=folder, output=folder / "cut", resume=True)
    for file in ("model.safetensors", "head.safetensors"):
        whole, cut = (folder / run / "model-1-layers" / file for run in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": [{"layers": 2}]}, "exits: 2 layers, but the model has 2"),
        ({"exits": [{"layers": 1}], "head": None}, r"exits need a \[head\]"),
        ({"exits": [{"layers": 1}], "layers": None, "lora": {"rank": 2}}, "exits go with lora = false"),
        ({"exits": [{"layers": 1}, {"layers": 1}]}, r"exits: layers \[1, 1\] must rise"),
    ],
)
def test_exits_that_cannot_be_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, msgspec.ValidationError), match=message):
        run_training(recipe_for(folder, **fields), data=folder, output=folder / "run")


def _stop_after(step: int) -> Any:
    def stop(progress: Any) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_the_average_is_what_is_written(folder: Path, lora: dict[str, Any] | None) -> None:
    """The average of the head was written, and beside it the last weights of the decoder."""
    exits = [] if lora else [{"layers": 1}]
    recipe = recipe_for(folder, steps=4, ema=0.5, lora=lora, layers=None, exits=exits, freeze_embedding=lora is None)
    result = run_training(recipe, data=folder, output=folder / "run").folder.with_name("adapter" if lora else "model")
    state = torch.load(folder / "run" / "checkpoints" / "step-00000004" / "state.pt")
    written = load_file(result / "head.safetensors")["weight"]
    assert torch.equal(written, state["average"]["head.weight"])
    assert not torch.equal(written, state["parameters"]["head.weight"])
    if lora:
        written = load_file(result / "adapter_model.safetensors")
        name, written = "layers.2.out.up.0", written["base_model.model.layers.2.self_attn.o_proj.lora_B.weight"]
    else:
        name, written = (
            "layers.0.out.weight",
            load_file(result / "model.safetensors")["layers.0.self_attn.o_proj.weight"],
        )
        shallow = load_file(result.with_name("model-1-layers") / "model.safetensors")
        assert torch.equal(shallow["layers.0.self_attn.o_proj.weight"], written)
    assert torch.equal(written, state["average"][name])
    assert not torch.equal(written, state["parameters"][name])


def test_a_second_stage_keeps_the_head_of_the_first(folder: Path) -> None:
    first = run_training(recipe_for(folder, steps=3), data=folder, output=folder / "first").folder
    recipe = recipe_for(folder, base=str(first), layers=None, steps=1, optimiser={"lr": 1e-12}, head={"dimensions": 24})
    second = run_training(recipe, data=folder, output=folder / "second").folder
    assert np.allclose(Encoder.load(first).encode(TEXTS), Encoder.load(second).encode(TEXTS), atol=1e-5)


def test_a_frozen_embedding_and_a_frozen_head_stay(folder: Path) -> None:
    recipe = recipe_for(folder, steps=3, head={"dimensions": 24, "trained": False})
    parameter_names = set(TrainingModel(recipe, torch.device("cpu")).parameters)
    assert "embedding.weight" not in parameter_names
    run_training(recipe, data=folder, output=folder / "run")
    assert not [name for name in torch.load(folder / "run" / "checkpoints" / "step-00000003" / "state.pt")["parameters"]
                if name.startswith(("head.", "embedding."))]  # fmt: skip


def test_kept_graphs_give_the_gradient_of_gradcache(folder: Path) -> None:
    computed = []
    for graph_tokens in (1, 10_000):
        recipe = recipe_for(folder, batch={"size": 8, "forward_tokens": 20, "graph_tokens": graph_tokens})
        model = TrainingModel(recipe, torch.device("cpu"))
        prompts = model.prompts(TEXTS, "")
        assert len(model.micro_batches([len(prompt.ids) for prompt in prompts])) > 2
        loss = backward_through(model, prompts, lambda vectors: vectors.square().mean())
        computed.append((loss, gradients(model)))
    assert computed[0][0] == pytest.approx(computed[1][0], rel=1e-6)
    for name, gradient in computed[0][1].items():
        assert torch.allclose(gradient, computed[1][1][name], rtol=1e-4, atol=1e-7), name


def test_batches_of_several_sets_use_every_set_in_turn(folder: Path) -> None:
    recipe = recipe_for(folder, batch={"size": 12, "sets": 4})
    sets, _ = load_data(recipe, folder, lambda _: None)
    batches = mixture_of(recipe, sets, folder, None).batches()
    seen = [next(batches) for _ in range(20)]
    assert all(sum(len(part.examples) for part in batch.parts) == 12 for batch in seen)
    assert all(len({part.source.name for part in batch.parts}) == len(batch.parts) for batch in seen)
    assert {part.source.name for batch in seen for part in batch.parts} == {"pairs", "texts"}
    resumed = mixture_of(recipe, sets, folder, None).batches(skip=7)
    assert next(resumed) == seen[7]


def test_merging_takes_the_head_along(folder: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        run_training(recipe_for(folder, steps=3, seed=seed), data=folder, output=folder / name)
    models = [str(folder / name / "model") for name in ("a", "b")]
    interpolate(models[0], models[1], 0.5, folder / "mean", "linear", "float32")
    heads = [load_file(Path(name) / "head.safetensors")["weight"] for name in (*models, str(folder / "mean"))]
    assert torch.allclose((heads[0] + heads[1]) / 2, heads[2], atol=1e-6)


def test_a_head_of_another_decoder_is_refused(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(4, 9), "bias": torch.zeros(4)}, folder / "student" / "head.safetensors")
    with pytest.raises(CheckpointError, match="takes 9 numbers and the decoder gives 32"):
        Encoder.load(folder / "student")
    save_file({"weight": torch.zeros(4, 32)}, folder / "student" / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.safetensors holds weight \[4, 32\] and bias \[\]"):
        Encoder.load(folder / "student")


def test_targets_of_another_length_are_refused_before_anything_is_computed(folder: Path) -> None:
    with pytest.raises(Exception, match=r"head\.dimensions = 16 and distillation\.dimensions = 24"):
        recipe_for(folder, head={"dimensions": 16})


def test_the_vector_loss_reads_a_prefix_of_the_target() -> None:
    target = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert float(vector_distance(target * 3, target)) == pytest.approx(0.0, abs=1e-6)
    assert float(vector_distance(target[:, :3], target)) == pytest.approx(0.0, abs=1e-6)
    assert float(vector_distance(-target, target)) == pytest.approx(2.0, abs=1e-6)
    with pytest.raises(ValueError, match="no target of 8"):
        vector_distance(torch.randn(5, 9), target)


def test_eight_bit_rows_are_within_half_a_step() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 40)[:, None]
    weight[0] = 0
    steps, size = int8_rows(weight)
    assert steps.dtype == torch.int8
    inside = weight.abs() <= 127 * size[:, None]
    assert bool(((steps * size[:, None] - weight).abs() <= size[:, None] * 0.5001)[inside].all())
    assert inside.float().mean() > 0.98


@pytest.mark.parametrize("fields", [{"layers": 2}, {"layers": None, "lora": {"rank": 4}}], ids=["whole", "adapter"])
def test_vectors_have_length_1_unless_the_recipe_says_no(folder: Path, fields: dict[str, Any]) -> None:
    runs, lengths = {}, {}
    for normalize in (True, False):
        head = {"dimensions": 24, "ridge": 40, "normalize": normalize}
        recipe = recipe_for(folder, steps=1, head=head, **fields)
        runs[normalize] = run_training(recipe, data=folder, output=folder / f"normalize-{normalize}").folder
        lengths[normalize] = np.linalg.norm(Encoder.load(runs[normalize]).encode(TEXTS), axis=1)
    assert np.allclose(lengths[True], 1, atol=1e-6)
    assert not np.allclose(lengths[False], 1, atol=1e-2)


def test_a_stage_without_a_head_of_its_own_leaves_the_lengths(folder: Path) -> None:
    first = run_training(recipe_for(folder, steps=1), data=folder, output=folder / "first").folder
    recipe = recipe_for(folder, base=str(first), layers=None, steps=1, head=None)
    second = run_training(recipe, data=folder, output=folder / "second").folder
    assert np.allclose(np.linalg.norm(Encoder.load(second).encode(TEXTS), axis=1), 1, atol=1e-6)


def test_a_run_from_before_goes_on_with_the_lengths_that_it_had(folder: Path) -> None:
    recipe = recipe_for(folder, steps=6, head={"dimensions": 24, "ridge": 40, "normalize": False})
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, data=folder, output=folder / "run", progress=_stop_after(5))
    file = folder / "run" / "run.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    del description["recipe"]["head"]["normalize"]
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(UsageError, match="normalize"):
        unit = recipe_for(folder, steps=6, head={"dimensions": 24, "ridge": 40})
        run_training(unit, data=folder, output=folder / "run", resume=True)
    resumed = run_training(recipe, data=folder, output=folder / "run", resume=True).folder
    assert not np.allclose(np.linalg.norm(Encoder.load(resumed).encode(TEXTS), axis=1), 1, atol=1e-2)


@pytest.mark.parametrize("part", ["adapter", "checkpoints/step-00000004"])
def test_the_mean_of_adapters_has_the_mean_of_their_heads(folder: Path, part: str) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        recipe = recipe_for(folder, steps=4, layers=None, lora={"rank": 4}, seed=seed)
        run_training(recipe, data=folder, output=folder / name)
    average([str(folder / name / part) for name in ("a", "b")], folder / "mean")
    heads = [load_file(folder / name / "adapter" / "head.safetensors")["weight"] for name in ("a", "b")]
    mean = load_file(folder / "mean" / "head.safetensors")["weight"]
    assert torch.allclose((heads[0] + heads[1]) / 2, mean, atol=1e-6)
    assert np.allclose(np.linalg.norm(Encoder.load(folder / "mean").encode(TEXTS), axis=1), 1, atol=1e-6)


def test_the_mean_of_checkpoints_has_the_head_that_was_not_trained(folder: Path) -> None:
    head = {"dimensions": 24, "ridge": 40, "trained": False}
    recipe = recipe_for(folder, steps=4, layers=None, lora={"rank": 4}, head=head, checkpoint_every=2)
    run_training(recipe, data=folder, output=folder / "run")
    adapter = folder / "run" / "adapter"
    steps = [str(path) for path in sorted((folder / "run" / "checkpoints").iterdir())]
    average(steps, folder / "mean")
    assert (folder / "mean" / "head.safetensors").read_bytes() == (adapter / "head.safetensors").read_bytes()
    (adapter / "head.safetensors").unlink()
    with pytest.raises(UsageError, match="let the run end first"):
        average(steps, folder / "other")


def test_models_and_adapters_with_other_steps_behind_the_pooling_are_not_mixed(folder: Path) -> None:
    for name, lora, normalize in (
        ("a", None, True),
        ("b", None, False),
        ("c", {"rank": 4}, True),
        ("d", {"rank": 4}, False),
    ):
        head = {"dimensions": 24, "ridge": 40, "normalize": normalize}
        recipe = recipe_for(folder, steps=1, layers=None, lora=lora, head=head)
        run_training(recipe, data=folder, output=folder / name)
    with pytest.raises(UsageError, match="differ in the steps behind the pooling"):
        average([str(folder / name / "model") for name in ("a", "b")], folder / "mean")
    with pytest.raises(AdapterMismatch, match="have different heads"):
        average([str(folder / name / "adapter") for name in ("c", "d")], folder / "mean")
