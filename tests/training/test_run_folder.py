"""Tests of a run's files: atomic writes, refusal of another run, and metrics after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.errors import StorageError, UsageError
from unmask.training.run_folder import RunFolder, describe_run

RECIPE: dict[str, Any] = {"steps": 3, "betas": (0.9, 0.99), "optimiser": {"lr": 0.1}, "data": [{"name": "a"}]}


def described(**changes: Any) -> dict[str, Any]:
    return describe_run({**RECIPE, **changes}, {"a": "digest"}, "1 x CPU")


def begun(path: Path) -> RunFolder:
    """The folder of a run that has made a step."""
    folder = RunFolder(path, keep=2)
    folder.begin(described(), resume=False)
    (path / "metrics.jsonl").write_text("{}\n")
    return folder


def test_a_run_that_failed_before_its_first_step_leaves_room_for_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.begin(described(), resume=False)
    for description in (described(), described(steps=4), {**described(), "data": {"a": "other"}}):
        assert folder.begin(description, resume=False) == json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "teachers").mkdir()  # vectors of a teacher, which belong to the recipe
    with pytest.raises(UsageError, match="holds a run with another data and recipe"):
        folder.begin(described(steps=5), resume=False)


def test_the_same_run_is_continued_and_only_when_asked(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    folder.begin(described(), resume=True)
    with pytest.raises(UsageError, match="holds this run already; continue it with --resume"):
        folder.begin(described(), resume=False)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"steps": 4}, r"recipe.steps was 3, is 4"),
        ({"optimiser": {"lr": 0.2}}, r"recipe.optimiser.lr was 0.1, is 0.2"),
        ({"data": [{"name": "b"}]}, r"recipe.data\[0\].name was 'a', is 'b'"),
        ({"data": [{"name": "a"}, {"name": "b"}]}, r"recipe.data had 1 entries, has 2"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(
    changes: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    folder = begun(tmp_path)
    with pytest.raises(UsageError, match=rf"holds a run with another recipe; .* \({difference}\)"):
        folder.begin(described(**changes), resume=True)


def test_other_data_is_refused(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with pytest.raises(UsageError, match=r"another data; .*data.a was 'digest', is 'other'"):
        folder.begin({**described(), "data": {"a": "other"}}, resume=True)


def test_a_field_that_has_come_since_does_not_end_a_run(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.begin(
        described(new=1), resume=True, upgrade=lambda stored: {**stored, "recipe": {**stored["recipe"], "new": 1}}
    )


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    (tmp_path / "run.json").write_text('{"recipe": ')
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match=r"run.json is damaged"):
        folder.begin(described(), resume=True)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    assert folder.latest() is None
    for step in (5, 10, 100):
        folder.save(step, {"x": torch.full((3,), float(step)), "best": {"a": 1.0}})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]
    latest = folder.latest()
    assert latest is not None
    assert latest[0] == 100
    assert torch.equal(latest[1]["x"], torch.full((3,), 100.0))


def test_a_checkpoint_cut_off_in_writing_is_not_seen(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.save(5, {"x": 1})
    cut = tmp_path / "checkpoints" / ".step-00000010.partial"
    cut.mkdir()
    (cut / "state.pt").write_bytes(b"half")
    latest = folder.latest()
    assert latest is not None
    assert latest[0] == 5
    folder.save(10, {"x": 2})
    assert not cut.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + b"\0" * 300])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.save(5, {"x": 1})
    (tmp_path / "checkpoints" / "step-00000005" / "state.pt").write_bytes(content)
    with pytest.raises(StorageError, match=r"step-00000005/state.pt cannot be read .*resume from an earlier one"):
        folder.latest()


def test_metrics_survive_a_line_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    assert folder.metrics() == []
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
    folder.truncate_metrics(2)
    folder.log({"step": 3, "loss": 0.4})
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write to"):
        RunFolder(tmp_path / "file" / "run", keep=1)
