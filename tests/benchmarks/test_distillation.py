"""`benchmarks/distillation.py`: variations are trained once, and shown in one table."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.training.tiny import texts_of, write_decoder
from unmask.training import curves

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "distillation.py"
RECIPE = """
base = "{base}"
objective = "supervised"
steps = 1
layers = 2
lora = false
precision = "float32"
device = "cpu"

[[exits]]
layers = 1

[head]
dimensions = 16
ridge = 40

[batch]
size = 8

[distillation]
dimensions = 16
vector_weight = 10.0

[[distillation.teachers]]
name = "mpnet"
model = "{teacher}"

[[dev]]
name = "pairs dev"
path = "pairs.tsv"
first = "one"
second = "other"
score = "score"

[[data]]
name = "texts"
path = "texts.txt"
text = "text"
use_labels = false
held_out = 6
"""


def test_variations_are_trained_once_and_stand_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    # A second of work for each training, which tests/training/test_curves.py tests.
    monkeypatch.setattr(curves, "draw_curves", lambda folder: None)
    write_decoder(tmp_path / "teacher")
    write_decoder(tmp_path / "student", num_hidden_layers=3)
    (tmp_path / "texts.txt").write_text("\n".join(texts_of(60)), encoding="utf-8")
    pairs = zip(texts_of(8), texts_of(16)[8:], range(8), strict=True)
    lines = ["one\tother\tscore", *(f"{one}\t{other}\t{score}" for one, other, score in pairs)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(base=tmp_path / "student", teacher=tmp_path / "teacher"), encoding="utf-8")
    output = tmp_path / "ablation"
    names = ("as in the recipe", "vectors alone", "similarities alone", "batch 256", "no exit")
    command = [str(SCRIPT), str(recipe), "--train", str(tmp_path), "--output", str(output), "--steps", "4"]
    command += [part for name in names for part in ("--only", name)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = capsys.readouterr().out
    assert [name in table for name in names] == [True] * 5
    results = json.loads((output / "distillation.json").read_text())
    assert {name: sorted(seeds) for name, seeds in results.items()} == {name: ["0", "1"] for name in names}
    # A batch of twice the size is made half as often; the data and their number of tokens are about the same.
    runs = output / "runs"
    steps = [(runs / n / "seed-0" / "metrics.jsonl").read_text().count('"loss"') for n in ("no-exit", "batch-256")]
    assert steps == [4, 2]
    assert (output / "distillation.svg").is_file()
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("metrics.jsonl")}
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("metrics.jsonl")} == before
    assert capsys.readouterr().out == table


def test_a_share_of_the_texts_is_a_share_of_each_set(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    further = '\n[[data]]\nname = "few"\npath = "texts.txt"\ntext = "text"\nuse_labels = false\nlimit = 30\n'
    recipe.write_text(RECIPE.format(base="base", teacher="teacher") + further, encoding="utf-8")
    read = runpy.run_path(str(SCRIPT))["_recipe"]
    whole = read(argparse.Namespace(recipe=recipe, share=None), [])
    part = read(argparse.Namespace(recipe=recipe, share=0.1), [])
    assert [(source.limit, source.share) for source in whole.data] == [(None, None), (30, None)]
    assert [(source.limit, source.share) for source in part.data] == [(None, 0.1), (3, None)]
    assert [source.held_out for source in part.data] == [6, 0]
