"""Tests of `unmask merge` and `unmask mine` as commands."""

import json
from pathlib import Path

import pytest
import torch

from unmask import Encoder
from unmask.cli import build_app
from unmask.training.merging import Factors, write_factors


def run(*arguments: str | Path) -> int:
    return build_app("*")([str(argument) for argument in arguments], exit_on_error=False, result_action="return_value")


@pytest.fixture
def adapters(golden_dir: Path, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator) / 20
        halves = {"layers.0.self_attn.q_proj": (a, b)}
        write_factors(folder, Factors(folder.name, str(golden_dir / "tiny_llama"), halves), {})
    return folders


def test_merge(golden_dir: Path, tmp_path: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = golden_dir / "tiny_llama"
    assert run("merge", "adapters", base, *adapters, "--output", tmp_path / "merged") == 0
    assert run("merge", "stack", *adapters, "-o", tmp_path / "stack") == 0
    assert "rank 4, exact" in capsys.readouterr().err
    assert run("merge", "average", *adapters, "-o", tmp_path / "mean", "--rank", "2") == 0
    assert "% of the update's norm is lost" in capsys.readouterr().err
    assert run("merge", "linear", *adapters, "-o", tmp_path / "linear", "--weight", "0.25") == 0
    assert run("merge", "slerp", base, adapters[0], "-o", tmp_path / "slerp", "--dtype", "bfloat16") == 0
    for folder in ("merged", "stack", "mean", "linear", "slerp"):
        assert Encoder.load(tmp_path / folder).encode("text").shape == (1, 64)


def test_mine(golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": f"question {word}", "p": f"answer {word}"} for word in ("one", "two", "three")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, output = golden_dir / "tiny_llama", tmp_path / "mined.jsonl"
    columns = ("--query", "q", "--positive", "p")
    assert run("mine", tmp_path / "rows.jsonl", "--model", model, *columns, "-o", output, "--max-share", "1") == 0
    said = capsys.readouterr().err
    assert "3 rows over 3 texts" in said and "the margin refused" in said
    assert [json.loads(line)["query"] for line in output.read_text().splitlines()] == [row["q"] for row in rows]
