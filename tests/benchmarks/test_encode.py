"""`benchmarks/encode.py`: the measured backends, the reasons for missing ones, and the tables in the pages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pytest
import torch
from backends import LONGEST, Backend
from backends.llama import interleaved
from backends.models import MIXES, SHEARED_LLAMA, texts_of, write_random
from backends.process import Absent, python_of
from backends.report import between, is_wrong, markdown, publish

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "encode.py"


def row(name: str, **values: Any) -> dict[str, Any]:
    """A measured row."""
    return {
        "name": name,
        "precision": "float32",
        "absent": None,
        "setting": "8 texts",
        "seconds": [2.0, 1.0, 4.0],
        "tokens_per_second": 500.0,
        "slowest": 250.0,
        "quickest": 1000.0,
        "ratio": 2.0,
        "ratio_per_round": [2.0, 1.5, 3.0],
        "share_of_peak": 0.5,
        "cosine_mean": 1.0,
        "cosine_worst": 1.0,
    } | values


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "shape": "135m",
        "model": "a model",
        "mix": "4 texts",
        "rounds": 3,
        "threads": 2,
        "dtype": "float32",
        "peak_gflops": 200.0,
        "gflop_per_token": 0.2,
        "versions": {"unmask": "1"},
        "machine": {"processor": "a processor", "cores": 2, "load_before": 0.1},
        "command": "python benchmarks/encode.py",
        "rows": [
            row("unmask"),
            row("another", cosine_mean=0.94, cosine_worst=0.52),
            {"name": "third", "precision": "float32", "absent": "not installed: pip install third"},
        ],
    }


def test_a_run_measures_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 600}
    write_random(SHEARED_LLAMA | shape | {"num_attention_heads": 4, "num_key_value_heads": 4}, tmp_path / "tiny")
    command = ["encode.py", "--model", str(tmp_path / "tiny"), "--texts", "6", "--rounds", "2", "--mix", "short"]
    command += ["--backends", "unmask", "transformers", "--batch", "4", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path)])
    monkeypatch.setattr(encode, "PRODUCTS", ((64, 64, 64),))  # half of the time would go into the true ones
    monkeypatch.setattr(encode, "keep_to", lambda threads: None)  # for good, and this process has other tests to run
    encode.main()
    report = json.loads((tmp_path / "encode-135m-short.json").read_text())
    ours, theirs = report["rows"]
    assert len(ours["seconds"]) == len(theirs["ratio_per_round"]) == 2
    assert ours["cosine_worst"] > 0.999_999, "ours are not those of transformers in both directions"
    assert theirs["cosine_worst"] > 0.999_999 and theirs["setting"] == "4 texts"
    assert report["tokens"] > 6
    assert "| unmask | **" in (tmp_path / "encode-135m-short.md").read_text()
    assert "best float32 product" in (tmp_path / "encode-135m-short.svg").read_text()


def test_a_peer_without_its_environment_says_how_to_get_it():
    peer = Backend("a peer", "nowhere:load", "a-peer", environment="that-nobody-made")
    with pytest.raises(Absent, match=r"not installed: .*\(that-nobody-made\): pip install a-peer"):
        python_of(peer)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "nothing"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "encode: " in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_vectors_and_absent_peers_are_marked(report: dict[str, Any]):
    _, another, third = markdown(report).splitlines()[2:5]
    assert "**wrong:** 0.940000 / 0.520000" in another
    assert third == "| third | not installed: pip install third | | | | |"
    assert not is_wrong(row("of 8 bits", cosine_mean=0.9993, cosine_worst=0.9989))


def test_publishing_replaces_what_stands_between_the_marks(report: dict[str, Any], tmp_path: Path):
    source, keep, page = tmp_path / "results", tmp_path / "docs" / "performance", tmp_path / "docs" / "page.md"
    source.mkdir()
    page.parent.mkdir()
    (source / "encode-135m.json").write_text(json.dumps(report))
    for suffix in (".md", ".svg", ".png"):
        (source / f"encode-135m{suffix}").write_text("")
    page.write_text("before\n<!-- encode-135m -->\nold\n<!-- /encode-135m -->\nafter\n")
    publish(source, keep, [page])
    text = page.read_text()
    assert text.startswith("before\n<!-- encode-135m -->\n| |") and text.endswith("<!-- /encode-135m -->\nafter\n")
    assert "old" not in text
    assert "](performance/encode-135m.svg)" in text
    assert (keep / "encode-135m.json").is_file()
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="has no place for a table: write <!-- encode-135m -->"):
        publish(source, keep, [page])


def test_an_unclosed_mark_is_named():
    with pytest.raises(ValueError, match="is not closed"):
        between("<!-- encode-135m --> and no end", "encode-135m", "table")


def test_rotated_halves_become_neighbours():
    rows = np.arange(8.0)[:, None]  # two heads of four rows
    assert interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_mixes_have_the_lengths_they_say():
    lengths = {mix: [len(text.split()) for text in texts_of(mix, 400)] for mix in MIXES}
    assert min(lengths["short"]) == 4 and max(lengths["short"]) == 16
    assert set(lengths["long"]) == {LONGEST}
    assert 25 < np.median(lengths["natural"]) < 35 and max(lengths["natural"]) > 200


def test_a_gpu_is_for_those_who_know_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        encode.options_of(["--device", "cuda", "--backends", "unmask", "openvino", "llama-cpp"])
    assert "--device cuda: llama-cpp, openvino can be measured on a processor only" in capsys.readouterr().err
