"""The clock of `ClusterWatch`. A head that is lost for good is in tests/cluster/test_replicas.py."""

import asyncio
from types import SimpleNamespace

import pytest

from unmask.router import ModelRegistry
from unmask.server import cluster_watch
from unmask.server.cluster_watch import ClusterWatch


async def test_the_time_in_which_a_question_has_no_answer_counts(golden_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that was lost while it was asked is given up no later than another one."""
    monkeypatch.setattr(cluster_watch, "_ASK_S", 0.01)
    monkeypatch.setattr(cluster_watch, "_LOST_S", 0.2)
    watch = ClusterWatch(SimpleNamespace(), "local", ModelRegistry([str(golden_dir / "tiny_llama")]))
    questions, lost = 0, asyncio.Event()

    async def ask() -> str:
        nonlocal questions
        questions += 1
        await asyncio.sleep(0.3)
        return "its head does not answer"

    async def lose(fault: str) -> None:
        lost.set()

    monkeypatch.setattr(watch, "_fault", ask)
    monkeypatch.setattr(watch, "_lose", lose)
    running = asyncio.create_task(watch.run())
    await lost.wait()
    assert questions == 1
    running.cancel()
