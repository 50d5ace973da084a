"""Tests of `unmask merge`, `unmask mine` and `unmask train --dry-run` as commands."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.tiny import GOLDEN, write_pairs
from unmask import Encoder
from unmask.cli import build_app
from unmask.training.adapter_products import Factors, write_factors


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


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, rows=40)
    (tmp_path / "recipe.toml").write_text(
        f"""base = "{GOLDEN / "tiny_llama"}"
objective = "supervised"
steps = 6
max_length = 64
data = [{{name = "pairs", path = "pairs.tsv", query = "query", positive = "positive", negatives = ["negative"]}}]
batch = {{size = 8}}
"""
    )
    before = sorted(tmp_path.iterdir())
    assert run("train", tmp_path / "recipe.toml", "--dry-run", "--json") == 0
    (plan,) = json.loads(capsys.readouterr().out)
    (source,) = plan["sources"]
    assert (source["name"], source["share"], source["examples_per_step"], plan["steps"]) == ("pairs", 1.0, 8, 6)
    assert plan["tokens"] == int(6 * 8 * source["tokens_per_example"])
    assert run("train", tmp_path / "recipe.toml", "--dry-run") == 0
    table = capsys.readouterr().out
    assert f"{source['examples']}" in table and f"about {plan['tokens']:,} tokens" in table
    assert sorted(tmp_path.iterdir()) == before
