"""Tests of the curves of a run."""

from pathlib import Path

import pytest

from tests.training.tiny import recipe_of
from unmask.training import curves
from unmask.training.curves import draw_curves
from unmask.training.mixture import SEVERAL
from unmask.training.run_folder import RunFolder
from unmask.training.train import run_training


def test_loss_and_scores_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = RunFolder(tmp_path, 1)
    draw_curves(folder)
    assert not list(tmp_path.glob("curves.*"))  # nothing to draw yet
    for step in range(1, 30):
        folder.log({"step": step, "data": "odd set" if step % 2 else "even set", "loss": 1 / step, "tokens": 90})
    draw_curves(folder)
    assert all(text in (tmp_path / "curves.svg").read_text() for text in ("odd set", "thousand tokens"))
    for step in (10, 20):
        scores = {"STS dev": 50.0 + step}
        folder.log({"step": step, "scores": scores, "exits": {"4": {"STS dev": 40.0 + step}}})
    draw_curves(folder)
    picture = (tmp_path / "curves.svg").read_text()
    assert all(text in picture for text in ("odd set", "even set", "STS dev", "dotted: exits"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_batches_of_several_sets_are_one_curve(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 1)
    for step in range(1, 30):
        data = SEVERAL.join(("odd", "even", str(step)))
        folder.log({"step": step, "data": data, "loss": 1 / step, "tokens": 90_000})
    draw_curves(folder)
    picture = (tmp_path / "curves.svg").read_text()
    assert "batches of several sets" in picture
    assert "million tokens" in picture
    assert SEVERAL not in picture


def test_a_run_ends_with_its_curves(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "draw_curves", draw_curves)  # which the fixture of all tests here takes away
    run_training(recipe_of(steps=2), data=data, output=tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").glob("curves.*")} == {"curves.svg", "curves.png"}
