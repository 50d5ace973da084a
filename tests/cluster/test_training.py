"""Restarts of a training run on a cluster, with processes that are lost as the test says."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import recipe_of
from unmask.cluster import training
from unmask.cluster.options import ClusterOptions
from unmask.errors import ClusterError


def lose_at(monkeypatch: pytest.MonkeyPatch, steps: Iterator[int]) -> list[str]:
    """Train with processes that are lost at these steps, one for each attempt; return the lines of the log."""
    lines: list[str] = []

    class Group:
        first_node = ""

        def __init__(self, *arguments: Any) -> None: ...

        def run(self, *arguments: Any) -> str:
            if (step := next(steps, None)) is None:
                return "done"
            raise training._Lost(step)

        def close(self) -> None: ...

    monkeypatch.setattr(training, "_Group", Group)
    monkeypatch.setattr(training, "connected", lambda address: nullcontext())
    options = ClusterOptions(cluster="auto")
    folder = Path("unused")
    training.train_on_cluster(options, recipe_of(), data=folder, output=folder, log=lines.append)
    return lines


@pytest.mark.parametrize("steps", [[105, 105, 105], [105, 104, 105], [3, 105, 105, 101]])
def test_a_run_that_is_lost_at_the_same_step_each_time_ends(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    attempts = iter([*steps, 105, 105])
    with pytest.raises(ClusterError, match=r"lost 3 times and the run came no further than step 105; the machine may"):
        lose_at(monkeypatch, attempts)
    assert next(attempts) == 105


def test_a_run_that_is_lost_before_its_first_step_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"lost 3 times before its first step"):
        lose_at(monkeypatch, iter([0, 0, 0]))


def test_a_run_that_comes_further_each_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lose_at(monkeypatch, iter([5, 4, 6, 6, 7, 7, 300, 20]))
    assert [re.findall(r"at step (\d+);", line) for line in lines] == [[str(n)] for n in (5, 4, 6, 6, 7, 7, 300, 20)]
