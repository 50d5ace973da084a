"""Commands that load models refuse files whose vectors are not those of the catalogue's record."""

import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.training.tiny import write_pairs
from unmask.catalogue.canary import make_canary
from unmask.catalogue.store import open_database, put_fields
from unmask.encoder import Encoder

Command = Callable[..., subprocess.CompletedProcess[str]]
TEXT = "a canary of a few words"

RECIPE = """base = "{base}"
objective = "supervised"
steps = 2
max_length = 64
device = "cpu"
[[data]]
name = "pairs"
path = "pairs.tsv"
query = "query"
positive = "positive"
[lora]
rank = 2
alpha = 4.0
[batch]
size = 4
"""


@pytest.fixture
def model(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "accounts").mkdir(parents=True)
    return tmp_path / "home"


def record(home: Path, model: Path, sign: int) -> None:
    """Put a record of the model's files into the operator's catalogue, with its canary vector times `sign`."""
    encoder = Encoder.load(model)
    canary = make_canary(TEXT, sign * encoder.encode(TEXT)[0])
    fields = {
        "revision": encoder.checkpoint.revision,
        "canary": {"text": canary.text, "vector": canary.vector},
    }
    with (
        closing(open_database(f"sqlite:///{home / 'accounts' / 'accounts.sqlite'}")) as database,
        database.begin() as connection,
    ):
        put_fields(connection, "org/live", fields, source=str(model))


def commands(model: Path, folder: Path, data: Path) -> dict[str, tuple[str, ...]]:
    write_pairs(folder)
    (folder / "texts.txt").write_text("a text\nanother text\n")
    (folder / "recipe.toml").write_text(RECIPE.format(base=model))
    columns = ("--query", "query", "--positive", "positive", "--max-share", "1")
    return {
        "encode": ("encode", str(folder / "texts.txt"), "-o", str(folder / "out.npy"), "--model", str(model)),
        "evaluate": ("evaluate", str(model), "--suite", "local", "--data", str(data), "-o", str(folder / "evaluation")),
        "compare": ("compare", str(model), f"{model}?causal", "--texts", str(folder / "texts.txt")),
        "train": ("train", str(folder / "recipe.toml"), "-o", str(folder / "run")),
        "mine": ("mine", str(folder / "pairs.tsv"), "--model", str(model), *columns, "-o", str(folder / "mined.jsonl")),
        "models show": ("models", "show", str(model)),
    }


@pytest.mark.parametrize("command", ["encode", "evaluate", "compare", "train", "mine", "models show"])
def test_a_model_whose_canary_differs_is_refused(
    unmask: Command, home: Path, model: Path, tmp_path: Path, eval_data: Path, command: str
) -> None:
    record(home, model, sign=-1)
    done = unmask(*commands(model, tmp_path, eval_data)[command], UNMASK_HOME=str(home))
    assert done.returncode == 1
    assert "tiny_llama loaded, but the files of revision" in done.stderr.replace("\n", " ")
    assert "run 'unmask onboard org/live'" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out.npy").exists() and not (tmp_path / "mined.jsonl").exists()


def test_a_model_whose_canary_is_right_is_encoded_with(unmask: Command, home: Path, model: Path, tmp_path: Path):
    record(home, model, sign=1)
    arguments = commands(model, tmp_path, tmp_path)["encode"]
    done = unmask(*arguments, UNMASK_HOME=str(home))
    assert done.returncode == 0, done.stderr


def test_a_catalogue_that_cannot_be_read_is_said(unmask: Command, home: Path, model: Path, tmp_path: Path):
    (home / "accounts" / "accounts.sqlite").write_bytes(b"no database" * 100)
    done = unmask(*commands(model, tmp_path, tmp_path)["encode"], UNMASK_HOME=str(home))
    assert done.returncode == 0
    assert "compared with the shipped records alone" in done.stderr
