"""`unmask --version -v`: what decides the vectors and the speed of this machine."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from unmask import __version__
from unmask.cli import main
from unmask.encoder.precision_choices import choices_folder, processor_name

REASON = "bfloat16: many texts take 30% and one text 94% of float32's time, vectors at most 6.8e-05 off"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def keep_choice(name: str, **changes: object) -> None:
    machine = {"processor": processor_name(), "torch": version("torch")} | changes
    values = {"dtype": "bfloat16", "reason": REASON, "model": name, "identity": "0123", "machine": machine}
    choices_folder().mkdir(parents=True, exist_ok=True)
    (choices_folder() / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path))


@pytest.mark.parametrize("words", [("--version", "-v"), ("-v", "-V"), ("-V", "--verbose")])
def test_versions_and_processor_are_named(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    text = printed(capsys, *words)
    assert text.splitlines()[:2] == [f"unmask {__version__}", f"python {platform.python_version()}"]
    assert f"torch {version('torch')}" in text and f"processor {processor_name()}" in text
    assert "nothing was measured yet" in text


def test_each_choice_of_this_processor_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    keep_choice("this-model")
    keep_choice("another-processor", processor="1 x Sinclair ZX81")
    keep_choice("another-torch", torch="1.0.0")
    (choices_folder() / "damage.json").write_text("[]", encoding="utf-8")
    text = printed(capsys, "--version", "-v")
    assert f"this-model: bfloat16. {REASON}" in text
    assert "another" not in text and "nothing was measured" not in text


def test_the_version_alone_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == printed(capsys, "-V") == f"unmask {__version__}\n"
