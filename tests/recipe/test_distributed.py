"""Two processes over gloo end with the parameters of one: the reference's gradients were never synchronised."""

import socket
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GOLDEN, distance, recipe_of, run_recipe, write_decoder

from unmask.recipe.distributed import Processes
from unmask.recipe.run_folder import RunFolder

RUNS: dict[str, dict[str, Any]] = {
    "supervised": {"contrastive": {"false_negative_margin": 0.05}, "matryoshka": [16]},
    "supervised, GradCache": {"batch": {"size": 8, "forward_tokens": 30}},
    "simcse": {"objective": "simcse", "simcse": {"attention_dropout": 0.0}},
    "mntp": {"objective": "mntp", "base": "tied", "mntp": {"block": 16}},
    "fewer texts than processes": {"objective": "mntp", "base": "tied", "batch": {"size": 1}},
    "all weights": {"lora": None, "base": str(GOLDEN / "tiny_gemma"), "optimiser": {"lr": 1e-3, "epsilon": 1e-4}},
}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def parameters(output: Path) -> dict[str, torch.Tensor]:
    latest = RunFolder(output, 1).latest()
    assert latest is not None
    return latest[1]["parameters"]


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_are_as_one(kind: str, processes: ForkServerContext, data: Path, tmp_path: Path) -> None:
    fields = dict(RUNS[kind])
    if fields.get("base") == "tied":
        fields["base"] = str(write_decoder(tmp_path / "tied", tie_word_embeddings=True))
    # A larger epsilon: Adam divides rounding errors of tiny gradients by their own size.
    recipe = recipe_of(**{"steps": 5, "optimiser": {"lr": 1e-2, "epsilon": 1e-4}, **fields})
    port = str(free_port())
    started = [processes.Process(target=run_recipe, args=(recipe, data, tmp_path / "one"))]
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        arguments = (recipe, data, tmp_path / "two")
        started.append(processes.Process(target=run_recipe, args=arguments, kwargs={"environment": environment}))
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert not list(tmp_path.glob("*.error"))
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert distance(two, one) < 1e-5
    losses = [[line["loss"] for line in RunFolder(tmp_path / name, 1).metrics()] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)


def test_a_process_alone_changes_nothing() -> None:
    alone = Processes()
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    assert torch.equal(alone.gather(rows, [2, 0, 1], 3), rows.detach()[[1, 2, 0]])
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert alone.sum(2.5) == 2.5
    assert alone.first


@given(st.lists(st.integers(1, 512), max_size=40), st.integers(1, 5))
def test_shares_hold_everything_once_and_are_even(lengths: list[int], size: int) -> None:
    shares = Processes(0, size).shares(lengths)
    assert len(shares) == size
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
