"""Tests of whole runs: killed and resumed, without disk or memory, and the files they leave."""

import json
import random
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import CPU, GOLDEN, WORDS, kill_when, recipe_of, run_recipe, steps_logged, texts_of
from unmask.encoder import Encoder
from unmask.errors import UsageError
from unmask.training.loop import TrainingProgress
from unmask.training.recipe import Recipe
from unmask.training.run_folder import RunFolder
from unmask.training.train import run_training


def run(processes: ForkServerContext, *arguments: Any, **named: Any) -> Any:
    process = processes.Process(target=run_recipe, args=arguments, kwargs=named)
    process.start()
    return process


def same_state(one: Path, other: Path) -> None:
    """Parameters and optimiser of the last checkpoints, bit for bit."""
    (step, a), (other_step, b) = (RunFolder(path, 1).latest() for path in (one, other))  # pyright: ignore[reportGeneralTypeIssues]
    assert step == other_step
    assert a["parameters"].keys() == b["parameters"].keys()
    assert all(torch.equal(a["parameters"][name], b["parameters"][name]) for name in a["parameters"])
    for index, state in a["optimiser"]["state"].items():
        assert all(torch.equal(value, b["optimiser"]["state"][index][key]) for key, value in state.items())


KILLED: dict[str, dict[str, Any]] = {
    "supervised": {
        "data": [{"name": "pairs", "path": "pairs.tsv", "query": "query", "positive": "positive", "held_out": 5}]
    },
    "simcse with dropout, streamed": {
        "objective": "simcse",
        "lora": {"rank": 4, "dropout": 0.1},
        "data": [{"name": "pairs", "path": "pairs.tsv", "text": "query", "stream": True, "weight": 1.0}],
    },
    "all weights": {"lora": None, "optimiser": {"lr": 1e-3}, "base": str(GOLDEN / "tiny_gemma")},
}


@pytest.mark.parametrize("kind", KILLED)
def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(
    kind: str, processes: ForkServerContext, data: Path, tmp_path: Path
) -> None:
    fields = {"steps": 30, "checkpoint_every": 3, "evaluate_every": 7, "shuffle_buffer": 9, **KILLED[kind]}
    recipe = recipe_of(**fields)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = run(processes, recipe, data, whole)
    chance = random.Random(4)
    kills = 0
    for _ in range(4):
        process = run(processes, recipe, data, broken, resume=True)
        before = len(steps_logged(broken))
        further = chance.randint(1, 7)
        pause = chance.choice([0, 1, 2, 5])  # looks at the file further, to fall on any part of a step

        def ready(count: int = before + further, left: list[int] = [pause]) -> bool:  # noqa: B006
            if len(steps_logged(broken)) < count:
                return False
            left[0] -= 1
            return left[0] < 0

        kills += kill_when(process, ready)
    last = run(processes, recipe, data, broken, resume=True)
    last.join()
    unbroken.join()
    assert (unbroken.exitcode, last.exitcode) == (0, 0)
    assert kills >= 3
    assert not Path(f"{broken}.error").exists()
    same_state(whole, broken)
    name = "adapter/adapter_model.safetensors" if recipe.lora is not None else "model/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert steps_logged(broken) == list(range(1, 31))
    if kind == "supervised":
        scores = [[line["scores"] for line in RunFolder(p, 1).metrics() if "scores" in line] for p in (whole, broken)]
        assert scores[0] == scores[1]
        best = "best/adapter_model.safetensors"
        assert (whole / best).read_bytes() == (broken / best).read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint(processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint_every=2)
    full = run(processes, recipe, data, tmp_path / "run", limits={3: ("RLIMIT_FSIZE", 20_000)})
    full.join()
    message = (tmp_path / "run.error").read_text()
    assert message.startswith("StorageError: cannot write to")
    assert "free some space and continue with --resume" in message
    latest = RunFolder(tmp_path / "run", 2).latest()
    assert latest is not None
    assert latest[0] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    run_training(recipe, data=data, output=tmp_path / "run", resume=True)
    run_training(recipe, data=data, output=tmp_path / "whole")
    same_state(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_at_the_end_is_an_error_too(processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint_every=100, steps=3)
    full = run(processes, recipe, data, tmp_path / "run", limits={3: ("RLIMIT_FSIZE", 20_000)})
    full.join()
    assert (tmp_path / "run.error").read_text().startswith("StorageError: cannot write")
    assert not (tmp_path / "run" / "adapter").exists()
    run_training(recipe, data=data, output=tmp_path / "run", resume=True)
    assert Encoder.load(tmp_path / "run" / "adapter").dim == 64


def test_memory_that_runs_out_leaves_the_last_checkpoint(processes: ForkServerContext, tmp_path: Path) -> None:
    chosen = random.Random(1)
    rows = [" ".join(chosen.choices(WORDS, k=900)) for _ in range(8)]  # attention weights of some 50 MB
    (tmp_path / "long.tsv").write_text("text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    data = [{"name": "long", "path": "long.tsv", "text": "text"}]
    recipe = recipe_of("simcse", data=data, batch={"size": 2}, steps=4, checkpoint_every=1, max_length=1500)
    out = run(processes, recipe, tmp_path, tmp_path / "run", limits={2: ("RLIMIT_AS", 8_000_000)})
    out.join()
    message = (tmp_path / "run.error").read_text()
    assert "TrainingError: step 3: out of memory. The last good checkpoint is step-00000002." in message
    latest = RunFolder(tmp_path / "run", 2).latest()
    assert latest is not None
    assert latest[0] == 2


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "bos_token"])
def test_the_result_is_loaded_by_its_own_name(pooling: str, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pooling=pooling, dev=[], steps=3)
    said: list[str] = []
    outcome = run_training(recipe, data=data, output=tmp_path / "run", log=said.append)
    assert outcome.folder == tmp_path / "run" / "adapter"
    assert said == ["pairs: 40 examples"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["pooling"] == pooling
    texts = texts_of(5)
    mine = Encoder.load(outcome.folder).encode(texts)
    explicit = Encoder.load(recipe.base, adapters=[outcome.folder], pooling=pooling).encode(texts)
    assert mine == pytest.approx(explicit, rel=1e-5, abs=1e-6)
    assert Encoder.load(recipe.base, pooling=pooling).encode(texts) != pytest.approx(mine, rel=1e-2)


def test_a_second_stage_is_found_with_the_first_below_it(data: Path, tmp_path: Path) -> None:
    run_training(recipe_of(steps=3), data=data, output=tmp_path / "first")
    first = tmp_path / "first" / "adapter"
    second = recipe_of(steps=3, adapters=[str(first)], seed=7)
    outcome = run_training(second, data=data, output=tmp_path / "second")
    texts = texts_of(5)
    explicit = Encoder.load(second.base, adapters=[first, outcome.folder]).encode(texts)
    assert Encoder.load(outcome.folder).encode(texts) == pytest.approx(explicit, rel=1e-4, abs=1e-5)


def test_all_weights_are_written_as_a_model(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(lora=None, steps=3, optimiser={"lr": 1e-3})
    outcome = run_training(recipe, data=data, output=tmp_path / "run")
    assert outcome.folder == tmp_path / "run" / "model"
    latest = RunFolder(tmp_path / "run", 1).latest()
    assert latest is not None
    written = load_file(outcome.folder / "model.safetensors")
    trained = latest[1]["parameters"]["layers.0.out.weight"]
    assert trained.dtype == torch.float32
    assert any(tensor.shape == trained.shape and torch.equal(tensor, trained) for tensor in written.values())
    assert not torch.allclose(
        torch.from_numpy(Encoder.load(outcome.folder).encode(texts_of(3))),
        torch.from_numpy(Encoder.load(recipe.base).encode(texts_of(3))),
        rtol=1e-3,
    )


def test_another_recipe_in_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run_training(recipe_of(steps=1), data=data, output=tmp_path)
    with pytest.raises(UsageError, match=r"another recipe; .*recipe.optimiser.lr was 0.01, is 0.5"):
        run_training(recipe_of(steps=1, optimiser={"lr": 0.5}), data=data, output=tmp_path, resume=True)
    with pytest.raises(UsageError, match="continue it with --resume"):
        run_training(recipe_of(steps=1), data=data, output=tmp_path)


def test_the_steps_may_change_until_the_rate_depends_on_them(data: Path, tmp_path: Path) -> None:
    optimiser = {"lr": 0.01, "warmup": 1, "schedule": "wsd", "decay_share": 0.5}
    run_training(recipe_of(steps=8, optimiser=optimiser), data=data, output=tmp_path / "whole")
    # Half of a run of 8 steps: at a constant rate, as it would be in one of 12.
    with pytest.raises(KeyboardInterrupt):
        run_training(
            recipe_of(steps=12, optimiser=optimiser, checkpoint_every=2),
            data=data,
            output=tmp_path / "changed",
            progress=interrupt_after(4),
        )
    for _ in range(2):  # the new number is in run.json, so the second time it is the same run
        recipe = recipe_of(steps=8, optimiser=optimiser, checkpoint_every=2)
        run_training(recipe, data=data, output=tmp_path / "changed", resume=True)
    assert losses(tmp_path / "changed") == losses(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"recipe\.steps was 8, is 12"):
        recipe = recipe_of(steps=12, optimiser=optimiser, checkpoint_every=2)
        run_training(recipe, data=data, output=tmp_path / "changed", resume=True)


def interrupt_after(step: int) -> Callable[[TrainingProgress], None]:
    def progress(done: TrainingProgress) -> None:
        if done.step == step:
            raise KeyboardInterrupt

    return progress


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_from_before_a_field_existed_is_continued(data: Path, tmp_path: Path) -> None:
    run_training(recipe_of(steps=2), data=data, output=tmp_path)
    file = tmp_path / "run.json"
    stored = json.loads(file.read_text())
    del stored["recipe"]["max_epochs"], stored["recipe"]["optimiser"]["clip"]
    file.write_text(json.dumps(stored))
    assert run_training(recipe_of(steps=2), data=data, output=tmp_path, resume=True).folder.is_dir()


def test_evaluation_data_is_kept_out(data: Path, tmp_path: Path) -> None:
    held = tmp_path / "eval"
    held.mkdir()
    query = (data / "pairs.tsv").read_text().splitlines()[1].split("\t")[0]
    (held / "test.tsv").write_text(f"text\n{query}, and so on\n{query.upper()}!\n", encoding="utf-8")
    said: list[str] = []
    recipe = recipe_of(steps=1, decontaminate_against=str(held))
    run_training(recipe, data=data, output=tmp_path / "run", log=said.append)
    assert said[-1].startswith("pairs: ")
    assert "overlap with evaluation data" in said[-1]
    with pytest.raises(UsageError, match="decontaminate_against: no folder at"):
        run_training(recipe_of(steps=1, decontaminate_against="nowhere"), data=data, output=tmp_path / "other")


def test_max_epochs_ends_the_run(data: Path, tmp_path: Path) -> None:
    run_training(recipe_of(steps=100, max_epochs=1.0), data=data, output=tmp_path)
    assert steps_logged(tmp_path) == [1, 2, 3, 4, 5]  # 40 rows, 8 at a time
    lines = RunFolder(tmp_path, 1).metrics()
    assert lines[-1]["lr"] == pytest.approx(1e-2 / 5)  # the schedule knows


def test_the_recipe_in_the_run_folder_is_the_recipe(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(steps=1)
    run_training(recipe, data=data, output=tmp_path)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert msgspec.convert(stored["recipe"], Recipe) == recipe
    assert set(stored["versions"]) >= {"unmask", "python", "torch"}
    assert stored["data"].keys() == {"pairs"}
    assert stored["hardware"].startswith("1 x CPU")
    assert CPU.type == "cpu"
