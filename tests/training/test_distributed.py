"""Compare two processes over gloo with one. The reference implementation never synchronised its gradients."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from tests.training.tiny import CPU, GOLDEN, distance, recipe_of, run_recipe, write_decoder, write_pairs
from unmask import Encoder
from unmask.errors import UsageError
from unmask.training import curves, distributed
from unmask.training.distributed import Processes
from unmask.training.distributed import processes as process_group
from unmask.training.recipe import Recipe
from unmask.training.run_folder import RunFolder
from unmask.training.sharding import place_like, unshard
from unmask.training.train import run_training
from unmask.training.training_model import TrainingModel

RUNS: dict[str, dict[str, Any]] = {
    "supervised": {"contrastive": {"false_negative_margin": 0.05}, "matryoshka": [16]},
    "supervised, GradCache": {"batch": {"size": 8, "forward_tokens": 30}},
    "simcse": {"objective": "simcse", "simcse": {"attention_dropout": 0.0}},
    "mntp": {"objective": "mntp", "base": "tied", "mntp": {"block": 16}},
    "fewer texts than processes": {"objective": "mntp", "base": "tied", "batch": {"size": 1}},
    "sharded": {"shard": True, "contrastive": {"false_negative_margin": 0.05}, "matryoshka": [16]},
    "sharded, dropout of nothing": {"shard": True, "lora": {"rank": 4, "alpha": 8.0, "dropout": 1e-9}},
    "sharded, GradCache": {"shard": True, "batch": {"size": 8, "forward_tokens": 30}, "gradient_checkpointing": True},
    "sharded, GradCache, uneven": {"shard": True, "batch": {"size": 3, "forward_tokens": 8}},
    "sharded simcse": {"shard": True, "objective": "simcse", "simcse": {"attention_dropout": 0.0}},
    "sharded mntp": {"shard": True, "objective": "mntp", "base": "tied", "mntp": {"block": 16}},
    "sharded mntp, all weights": {"shard": True, "objective": "mntp", "base": "tied", "lora": None},
    "sharded, fewer texts than processes": {"shard": True, "objective": "mntp", "base": "tied", "batch": {"size": 1}},
    "all weights, sharded": {
        "shard": True,
        "lora": None,
        "base": str(GOLDEN / "tiny_gemma"),
        "optimiser": {"lr": 1e-3, "epsilon": 1e-4},
    },
    "sharded, head and average": {"shard": True, "head": {"dimensions": 16}, "ema": 0.7},
    "all weights, sharded, head and average, GradCache": {
        "shard": True,
        "lora": None,
        "head": {"dimensions": 16, "lr": 2e-2},
        "ema": 0.7,
        "batch": {"size": 8, "forward_tokens": 30},
        "optimiser": {"lr": 1e-3, "epsilon": 1e-4, "clip": 0.2},
    },
    "all weights by Muon": {"lora": None, "optimiser": {"method": "muon", "lr": 1e-3, "epsilon": 1e-4}},
    "all weights": {"lora": None, "base": str(GOLDEN / "tiny_gemma"), "optimiser": {"lr": 1e-3, "epsilon": 1e-4}},
}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def parameters(output: Path, kind: str = "parameters") -> dict[str, torch.Tensor]:
    latest = RunFolder(output, 1).latest()
    assert latest is not None
    return latest[1][kind]


def run_together(
    processes: ForkServerContext,
    size: int,
    recipe: Recipe,
    data: Path,
    output: Path,
    per_machine: int | None = None,
    **more: Any,
) -> None:
    """One run by `size` processes, to its end."""
    run_apart(processes, recipe, [(data, output)] * size, per_machine, **more)
    assert not list(output.parent.glob("*.error"))


def run_apart(
    processes: ForkServerContext,
    recipe: Recipe,
    folders: Sequence[tuple[Path, Path]],
    per_machine: int | None = None,
    **more: Any,
) -> None:
    """One run by processes that each see a data folder and an output folder of their own."""
    port, size = str(free_port()), len(folders)
    started = []
    for rank, (data, output) in enumerate(folders):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(per_machine or size)}
        keywords = {"environment": environment if size > 1 else {}, **more}
        started.append(processes.Process(target=run_recipe, args=(recipe, data, output), kwargs=keywords))
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * size


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_are_as_one(kind: str, processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    fields = dict(RUNS[kind])
    if fields.get("base") == "tied":
        fields["base"] = str(write_decoder(tmp_path / "tied", tie_word_embeddings=True))
    # A larger epsilon: Adam divides rounding errors of tiny gradients by their own size.
    recipe = recipe_of(**{"steps": 3, "optimiser": {"lr": 1e-2, "epsilon": 1e-4}, **fields})
    run_together(processes, 1, recipe, data, tmp_path / "one")
    run_together(processes, 2, recipe, data, tmp_path / "two")
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert distance(two, one) < 1e-5
    if recipe.ema is not None:
        assert distance(parameters(tmp_path / "two", "average"), parameters(tmp_path / "one", "average")) < 1e-5
    for field in ("loss", "norm"):
        logged = [[line[field] for line in RunFolder(tmp_path / name, 1).metrics()] for name in ("one", "two")]
        assert logged[1] == pytest.approx(logged[0], rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8.0, "dropout": 0.0}, None])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_sharded_run_goes_on_with_another_number_of_processes(
    before: int, after: int, lora: Any, processes: ForkServerContext, data: Path, tmp_path: Path
) -> None:
    held = {"name": "pairs", "path": "pairs.tsv", "query": "query", "positive": "positive", "held_out": 8}
    rate = {"lr": 1e-2 if lora else 1e-3, "epsilon": 1e-4}
    more: dict[str, Any] = {"head": {"dimensions": 16}} if lora else {}  # a head is whole in every process
    recipe = recipe_of(shard=True, lora=lora, optimiser=rate, checkpoint_every=3, evaluate_every=3, data=[held], **more)
    whole = tmp_path / "whole"
    run_together(processes, before, recipe, data, whole)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    run_together(processes, after, recipe, data, tmp_path / "cut", resume=True)
    assert distance(parameters(tmp_path / "cut"), parameters(whole)) < 1e-5
    scores = [
        [line["scores"] for line in RunFolder(run, 1).metrics() if "scores" in line]
        for run in (whole, tmp_path / "cut")
    ]
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]
    result = "adapter" if lora else "model"
    written = [Encoder.load(run / result).encode(["one text", "another"]) for run in (whole, tmp_path / "cut")]
    np.testing.assert_allclose(written[0], written[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shard", [False, True])
def test_a_machine_that_does_not_see_the_run_goes_on_with_the_others(
    shard: bool, processes: ForkServerContext, data: Path, tmp_path: Path
) -> None:
    """It used to begin at step 0 without a word, and the first sum mixed both."""
    recipe = recipe_of(shard=shard, optimiser={"lr": 1e-2, "epsilon": 1e-4}, checkpoint_every=3)
    whole, cut, elsewhere = tmp_path / "whole", tmp_path / "cut", tmp_path / "elsewhere"
    run_together(processes, 2, recipe, data, whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    run_apart(processes, recipe, [(data, cut), (data, elsewhere)], 1, resume=True)
    assert not list(tmp_path.glob("*.error"))
    assert distance(parameters(cut), parameters(whole)) < 1e-6
    assert [line["step"] for line in RunFolder(cut, 1).metrics()] == [1, 2, 3, 4, 5, 6]
    assert not list((elsewhere / "checkpoints").iterdir())


def test_machines_with_other_data_are_refused(processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_pairs(tmp_path / "other", rows=30)
    outputs = [tmp_path / "first", tmp_path / "second"]
    run_apart(processes, recipe_of(), [(data, outputs[0]), (other, outputs[1])], 1)
    for output in outputs:
        error = Path(f"{output}.error").read_text()
        assert error.startswith("UsageError: the data set pairs differs between machines (")


def test_two_machines_of_two_processes_are_as_one(processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(shard="machine", steps=3, optimiser={"lr": 1e-2, "epsilon": 1e-4}, matryoshka=[16])
    run_together(processes, 1, recipe, data, tmp_path / "one")
    run_together(processes, 4, recipe, data, tmp_path / "four", per_machine=2)
    assert distance(parameters(tmp_path / "four"), parameters(tmp_path / "one")) < 1e-5


def test_a_process_that_torchrun_starts_again_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = {"lr": 1e-2, "schedule": "constant", "warmup": 0}
    run_training(recipe_of(steps=2, optimiser=rate), data=data, output=tmp_path / "run")
    longer = recipe_of(steps=3, optimiser=rate)
    with pytest.raises(UsageError, match="holds this run already; continue it with --resume"):
        run_training(longer, data=data, output=tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_training(longer, data=data, output=tmp_path / "run")
    assert [line["step"] for line in RunFolder(tmp_path / "run", 1).metrics()] == [1, 2, 3]


def train_under_an_agent(recipe: Recipe, data: Path, output: Path) -> None:
    """Train in a process that an agent of torchrun starts; the second one is killed once, after two steps."""
    torch.set_num_threads(1)
    curves.draw_curves = lambda folder: None

    def die() -> None:
        while not (output / "checkpoints" / "step-00000002").exists():
            time.sleep(0.001)
        output.with_name("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
        threading.Thread(target=die, daemon=True).start()
    run_training(recipe, data=data, output=output)


def run_agent(port: int, recipe: Recipe, data: Path, output: Path) -> None:
    """Run one of the two agents that `torchrun --nnodes 2` would run on two machines, with one process."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # An agent has threads, so it must not fork itself.
    multiprocessing.set_forkserver_preload(["unmask.training.train", "torch.distributed", "torch._dynamo"])
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        local_addr="127.0.0.1",
        max_restarts=3,
        start_method="forkserver",
    )
    elastic_launch(config, train_under_an_agent)(recipe, data, output)


def test_two_agents_of_torchrun_are_as_one_process_and_go_on_when_a_process_is_killed(
    processes: ForkServerContext, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(steps=20, optimiser={"lr": 1e-2, "epsilon": 1e-4}, checkpoint_every=1)
    one, two, port = tmp_path / "one", tmp_path / "two", free_port()
    agents = [processes.Process(target=run_agent, args=(port, recipe, data, two)) for _ in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    assert [agent.exitcode for agent in agents] == [0, 0]
    assert (tmp_path / "killed").exists()
    run_together(processes, 1, recipe, data, one)
    assert distance(parameters(two), parameters(one)) < 1e-4
    assert [line["step"] for line in RunFolder(two, 1).metrics()] == list(range(1, 21))


def test_a_launcher_that_restarts_with_addresses_of_the_first_start_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UsageError, match="start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run_training(recipe_of(steps=1), data=data, output=tmp_path / "run")


def check_parts_of_a_group(environment: dict[str, str], base: str, output: Path) -> None:
    """In a process of a group that its launcher has joined: write what a checkpoint keeps here, and gradients' sums."""
    os.environ.update(environment)
    torch.distributed.init_process_group("gloo")
    with process_group(CPU) as group:
        model = TrainingModel(recipe_of(base=base, shard=True), CPU, group)
        weights = unshard({"parameters": model.parameters}, group.is_main)["parameters"]
        distributed.BUCKET_BYTES = 24
        trained = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5, 1, 20, 2)]
        for number, parameter in enumerate(trained[:-1]):
            parameter.grad = torch.full_like(parameter, 10.0**number * (group.rank + 1))
        group.sum_gradients(trained)
        sums = [sorted(set(parameter.grad.tolist())) for parameter in trained if parameter.grad is not None]
    tensors = sum(value is not None for value in weights.values())
    report = {"tensors": tensors, "all": len(weights), "sums": sums, "joined": torch.distributed.is_initialized()}
    output.with_suffix(f".{group.rank}").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


def test_a_group_that_the_launcher_has_joined_is_used_and_only_its_first_process_keeps_weights(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = (str(GOLDEN / "tiny_llama"), tmp_path / "report")
    started = [
        processes.Process(target=check_parts_of_a_group, args=({**environment, "RANK": rank}, *arguments))
        for rank in "01"
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    reports = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in "01"]
    assert reports[0]["tensors"] == reports[0]["all"] > 0
    assert reports[1]["tensors"] == 0
    for report in reports:
        assert report["joined"]  # the group is the launcher's to end
        assert report["sums"] == [[3.0], [30.0], [300.0], [3000.0], [0.0]]


def halves(environment: dict[str, str], base: str, output: Path) -> None:
    """Build a sharded model in a new process, and write how many of its numbers are on this rank."""
    os.environ.update(environment)
    with process_group(CPU) as group:
        model = TrainingModel(recipe_of(base=base, shard=True), CPU, group)
        here = sum(p._local_tensor.numel() for p in model.decoder.parameters() if isinstance(p, DTensor))
        all_of_it = sum(p.numel() for p in model.decoder.parameters())
        output.with_suffix(f".{group.rank}").write_text(f"{here} {all_of_it}")


def test_each_process_holds_its_part(processes: ForkServerContext, tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    base, report = str(GOLDEN / "tiny_llama"), tmp_path / "told"
    started = [processes.Process(target=halves, args=({**environment, "RANK": rank}, base, report)) for rank in "01"]
    for process in started:
        process.start()
    for process in started:
        process.join()
    parts = [[int(word) for word in report.with_suffix(f".{rank}").read_text().split()] for rank in "01"]
    assert parts[0][0] + parts[1][0] == parts[0][1]  # every weight is somewhere, once
    assert max(part[0] for part in parts) < 0.6 * parts[0][1]


def test_a_process_alone_changes_nothing() -> None:
    alone = Processes()
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    assert torch.equal(alone.gather(rows, [2, 0, 1], 3), rows.detach()[[1, 2, 0]])
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert alone.sum(2.5) == 2.5
    assert alone.is_main


def test_a_tensor_is_placed_on_the_device_of_its_parameter() -> None:
    """An average that was read from a checkpoint had stayed on the CPU, so a run on a GPU ended in its next step."""

    class Moved(torch.Tensor):
        def to(self, *places: Any) -> "Moved":  # pyright: ignore[reportIncompatibleMethodOverride]
            self.places = places
            return self

    parameter: Any = SimpleNamespace(device=torch.device("cuda", 1), shape=(3,))  # of a machine with two GPUs
    moved: Any = place_like(torch.ones(3).as_subclass(Moved), parameter)
    assert moved.places == (parameter.device,)
    on_cpu = torch.nn.Parameter(torch.zeros(3))
    value = torch.ones(3)
    assert place_like(value, on_cpu) is value


@given(st.lists(st.integers(1, 512), max_size=40), st.integers(1, 5))
def test_shares_hold_everything_once_and_are_even(lengths: list[int], size: int) -> None:
    shares = Processes(0, size).shares(lengths)
    assert len(shares) == size
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
