"""The command line as a user meets it: its output, its exit code; what hangs on the process, in one of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder, __version__
from unmask.checkpoint import DEFAULT_MODEL
from unmask.checkpoint.shipped import SHIPPED

Ended = subprocess.CompletedProcess[str]
Command = Callable[..., Ended]


def process(*arguments: str, stdin: str | None = None, cwd: Path | None = None) -> Ended:
    command = [sys.executable, "-m", "unmask", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def test_version() -> None:
    assert process("--version").stdout.strip() == f"unmask {__version__}"


def test_models_lists_the_default(unmask: Command) -> None:
    done = unmask("models")
    assert done.returncode == 0 and DEFAULT_MODEL in done.stdout


def test_models_that_share_weights_are_stored_together(unmask: Command, tmp_path: Path) -> None:
    folder = tmp_path / "models" / SHIPPED[DEFAULT_MODEL].kept_as
    for stored in (False, True):
        listed = json.loads(unmask("models", "--json", UNMASK_HOME=str(tmp_path)).stdout)
        by_name = {row["model"]: row["stored"] for row in listed}
        assert by_name[DEFAULT_MODEL] is by_name["unmask/smollm2-135m-embed"] is stored
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.gguf").touch()


def test_encode_a_file(unmask: Command, golden_dir: Path, tmp_path: Path) -> None:
    model = golden_dir / "tiny_llama"
    (tmp_path / "in.txt").write_text("one\ntwo words\nthree whole words\n", encoding="utf-8")
    output = tmp_path / "out.npy"
    done = unmask("encode", str(tmp_path / "in.txt"), "--output", str(output), "--model", str(model), "--normalize")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith(f"-> {output}") and "3 texts" in done.stderr
    expected = Encoder.load(model).encode(["one", "two words", "three whole words"], normalize=True)
    np.testing.assert_allclose(np.load(output), expected, rtol=0, atol=1e-6)


def test_encode_a_pipe(golden_dir: Path) -> None:
    model = str(golden_dir / "tiny_llama")
    done = process("encode", "-", "--output", "-", "--output-format", "jsonl", "--model", model, stdin="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["index"] for row in rows] == [0, 1] and len(rows[0]["embedding"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "missing.txt", "-o", "out.npy"], "missing.txt"),
        (["encode", "in.txt", "-o", "out.npy", "--model", "/no/such/model"], "no model at /no/such/model"),
        (["encode", "in.txt", "-o", "out.npy", "--pooling", "median"], "choose one of mean"),
        (["encode", "in.txt", "-o", "out.npy", "--dimensions", "9999"], "dimensions=9999"),
        (["encode", "in.txt", "-o", "out.xyz"], "out.xyz"),
        (["serve", "--host", "0.0.0.0"], "no API key"),
        (["serve", "--api-key-file", "missing"], "--api-key-file missing"),
        (["serve", "--port", "99999"], "99999"),
        (["serve", "--trusted-proxy", "10.0.0.1/8"], "10.0.0.1/8"),
        (["serve", "--accounts", "--oidc-client-id", "us"], "need --oidc-issuer"),
        (["serve", "--accounts", "--oidc-issuer", "http://example.org"], "give its https address"),
        (["serve", "--accounts", "--oidc-issuer", "https://example.org", "--oidc-client-id", "us"], "client secret"),
        (["serve", "--oidc-issuer", "https://example.org", "--oidc-client-secret-file", "none"], "none cannot be read"),
    ],
)
def test_a_users_mistake_is_one_line(
    unmask: Command,
    golden_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("a text\n", encoding="utf-8")
    if arguments[0] == "encode" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(golden_dir / "tiny_llama")]
    done = unmask(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = process("serve", "--api-key-file", "missing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("unmask: --api-key-file missing") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "advice"), [("train", "with --resume"), ("encode", "again")])
def test_an_interrupt_says_how_to_go_on(
    unmask: Command, monkeypatch: pytest.MonkeyPatch, command: str, advice: str
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"unmask.cli.{command}.{command}", interrupt)
    done = unmask(command)
    assert done.returncode == 130
    assert done.stderr == f"unmask: interrupted; run the same command {advice} to continue\n"


def test_an_empty_key_file(unmask: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing yet\n\n", encoding="utf-8")
    done = unmask("serve", "--api-key-file", str(tmp_path / "keys"))
    assert done.returncode == 1 and "holds no key" in done.stderr


def test_a_key_that_no_header_can_carry_is_found_by_its_line(unmask: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nsk-a-key\nsk-schlüssel\n", encoding="utf-8")
    done = unmask("serve", "--api-key-file", str(tmp_path / "keys"))
    assert done.returncode == 1 and f"{tmp_path / 'keys'}, line 3: " in done.stderr and "schl" not in done.stderr


def test_a_byte_order_mark_is_no_part_of_a_key(unmask: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-a-key\n", encoding="utf-8-sig")
    done = unmask("serve", "--accounts", "--api-key-file", str(tmp_path / "keys"))
    assert done.returncode == 1 and "use one of them" in done.stderr


def test_home_lists_folders_and_prunes_caches(unmask: Command, tmp_path: Path) -> None:
    for name in ("prepacked", "precision", "models", "vectors"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_bytes(b"x" * 2_000_000)
    listed = unmask("home", "--json", UNMASK_HOME=str(tmp_path))
    sizes = {row["folder"]: (row["bytes"], row["cache"]) for row in json.loads(listed.stdout)}
    assert sizes["prepacked"] == (2_000_000, True) and sizes["models"] == (2_000_000, False)
    assert sizes["words"] == (0, True)
    refused = unmask("home", "prune", "models", UNMASK_HOME=str(tmp_path))
    assert refused.returncode == 1 and "'models' is no cache" in refused.stderr
    pruned = unmask("home", "prune", UNMASK_HOME=str(tmp_path))
    assert pruned.returncode == 0 and "prepacked: 2.0 MB removed" in pruned.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "vectors"]
    assert unmask("home", "prune", "vectors", UNMASK_HOME=str(tmp_path)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_models_show_says_which_precision_and_why(unmask: Command, golden_dir: Path) -> None:
    done = unmask("models", "show", str(golden_dir / "tiny_llama"), "--json")
    facts = {row["fact"]: row["value"] for row in json.loads(done.stdout)}
    assert facts["precision"] == "float32" and "192,960 weights" in facts["precision_reason"]
    assert facts["dimensions"] == 64 and facts["bits_per_weight"] == 32
