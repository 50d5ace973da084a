"""Hub-layout folders: every file form loads alike, every damage is one sentence."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint.layouts import LAYOUTS, write_layout
from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.tensors import innermost, require_finite
from unmask.errors import CheckpointError, UnmaskError

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return Encoder.load(GOLDEN / "tiny_llama").encode(["one text", "another"])


def reload(folder: Path) -> np.ndarray:
    return Encoder.load(folder).encode(["one text", "another"])


def shard(folder: Path, name: str, index: str, save: Any) -> None:
    """Split the weights over two files, with an index as the hub has it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    where = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        file = name.format(number)
        save({key: tensors[key] for key in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_sharded_safetensors(copied, expected: np.ndarray) -> None:
    folder = copied("tiny_llama")
    shard(folder, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json", save_file)
    np.testing.assert_array_equal(reload(folder), expected)


def test_one_file_counts_before_stale_shards_as_in_transformers(copied) -> None:
    from transformers import AutoModel

    folder = copied("tiny_llama")
    newer = {name: 2 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    shard(folder, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json", save_file)
    save_file(newer, folder / "model.safetensors")
    theirs = AutoModel.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(open_checkpoint(folder).tensors.read("embed_tokens.weight"), theirs)


@pytest.mark.parametrize("factor", [1, 3], ids=["equal", "different"])
@pytest.mark.parametrize("form", ["another shard", "another name", "another name in a pickle"])
def test_a_tensor_that_is_there_twice_is_refused_unless_both_say_the_same(
    copied, expected: np.ndarray, form: str, factor: int
) -> None:
    folder = copied("tiny_llama")
    tensors = load_file(folder / "model.safetensors")
    twice = {"embed_tokens.weight": factor * tensors["embed_tokens.weight"]}
    if form == "another shard":
        shard(folder, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json", save_file)
        other = folder / "model-00002-of-00002.safetensors"
        save_file({**load_file(other), **twice}, other)
        other = folder / "model-00001-of-00002.safetensors"
        save_file({**load_file(other), "embed_tokens.weight": tensors["embed_tokens.weight"]}, other)
    else:
        both = {**tensors, **{f"model.{name}": tensor.clone() for name, tensor in twice.items()}}
        if form == "another name":
            save_file(both, folder / "model.safetensors")
        else:
            (folder / "model.safetensors").unlink()
            torch.save(both, folder / "pytorch_model.bin")
    if factor == 1:
        np.testing.assert_array_equal(reload(folder), expected)
    else:
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is there twice"):
            Encoder.load(folder)


def test_sharded_pickle(copied, expected: np.ndarray) -> None:
    folder = copied("tiny_llama")
    shard(folder, "pytorch_model-{:05}-of-00002.bin", "pytorch_model.bin.index.json", torch.save)
    np.testing.assert_array_equal(reload(folder), expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle(copied, expected: np.ndarray, zipped: bool) -> None:
    folder = copied("tiny_llama")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    weights.unlink()
    np.testing.assert_array_equal(reload(folder), expected)


def test_causal_lm_names(copied, expected: np.ndarray) -> None:
    folder = copied("tiny_llama")
    file = folder / "model.safetensors"
    tensors = {f"model.{key}": value for key, value in load_file(file).items()}
    save_file({**tensors, "lm_head.weight": torch.zeros(800, 64)}, file)
    np.testing.assert_array_equal(reload(folder), expected)


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
        "base_model.model.layers.3.mlp.up_proj.weight",
        "base_model.model.model.layers.3.mlp.up_proj.weight",
    ],
)
def test_innermost(name: str) -> None:
    assert innermost(name) == "layers.3.mlp.up_proj.weight"


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_pickle_that_would_run_code_is_refused(copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied("tiny_llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"embed_tokens.weight": Exploit()}))
    with pytest.raises(CheckpointError, match="refusing to run"):
        open_checkpoint(folder)
    assert not (tmp_path / "pwned").exists()


def rewrite(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def damage(folder: Path, kind: str) -> None:
    weights, config, tokenizer = folder / "model.safetensors", folder / "config.json", folder / "tokenizer.json"
    if kind == "no config":
        config.unlink()
    elif kind == "config not JSON":
        config.write_text("{")
    elif kind == "config without model_type":
        config.write_text("{}")
    elif kind == "unknown architecture":
        rewrite(config, model_type="martian")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "empty weights":
        weights.write_bytes(b"")
    elif kind == "wrong shapes":
        rewrite(config, intermediate_size=200)
    elif kind == "wrong vocabulary":
        rewrite(config, vocab_size=900)
    elif kind == "fewer layers in the config":
        rewrite(config, num_hidden_layers=2)
    elif kind == "more layers in the config":
        rewrite(config, num_hidden_layers=4)
    elif kind == "no tokenizer":
        tokenizer.unlink()
    elif kind == "damaged tokenizer":
        tokenizer.write_text(tokenizer.read_text()[:500])
    elif kind == "tokenizer of another model":
        content = json.loads(tokenizer.read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<far>"})
        tokenizer.write_text(json.dumps(content))
    elif kind == "missing shard":
        shard(folder, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json", save_file)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "shard outside the folder":
        weights.unlink()  # one file would count before the index
        index = {"weight_map": {"a": "../../etc/passwd"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "llm2vec_config not JSON":
        (folder / "llm2vec_config.json").write_text("mean")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "neither config.json nor adapter_config.json"),
        ("config not JSON", "not JSON"),
        ("config without model_type", "names no model_type"),
        ("unknown architecture", "'martian'"),
        ("no weights", "holds no weights"),
        ("truncated weights", "damaged or truncated"),
        ("empty weights", "damaged or truncated"),
        ("wrong shapes", r"wrong shape: layers\.0\.mlp\.(gate|up)_proj"),
        ("wrong vocabulary", r"wrong shape: embed_tokens\.weight \[800, 64\]"),
        ("fewer layers in the config", "no place for"),
        ("more layers in the config", r"lack 9 tensors, for example 'layers\.3\."),
        ("no tokenizer", "has no tokenizer"),
        ("damaged tokenizer", "tokenizer.json is damaged"),
        ("tokenizer of another model", "ids up to 800, but the embedding has 800 rows"),
        ("missing shard", "lacks 1 of 2 shards"),
        ("shard outside the folder", "outside its own folder"),
        ("llm2vec_config not JSON", "llm2vec_config.json is not JSON"),
    ],
)
def test_damage_is_one_clear_sentence(copied, kind: str, message: str) -> None:
    folder = copied("tiny_llama")
    damage(folder, kind)
    with pytest.raises(UnmaskError, match=message) as caught:
        Encoder.load(folder)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_truncation_or_flipped_header_byte_escapes(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(GOLDEN / "tiny_llama", folder)
    whole = (GOLDEN / "tiny_llama" / "model.safetensors").read_bytes()
    if data.draw(st.booleans()):
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        position = data.draw(st.integers(0, 3000))
        content = whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]
    (folder / "model.safetensors").write_bytes(content)
    try:
        Encoder.load(folder)
    except UnmaskError as error:
        assert "\n" not in str(error)


def test_own_encoder_settings_are_honoured(copied) -> None:
    folder = copied("tiny_llama")
    settings = {"pooling_mode": "weighted_mean", "max_length": 20, "doc_max_length": 15, "skip_instruction": False}
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    encoder = Encoder.load(folder)
    assert (encoder.pooling, encoder.max_length) == ("weighted_mean", 20)
    assert Encoder.load(folder, pooling="mean", max_length=30).max_length == 30


def test_revision_is_the_content(copied) -> None:
    folder = copied("tiny_llama")
    before = open_checkpoint(folder).revision
    assert before == open_checkpoint(GOLDEN / "tiny_llama").revision
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).revision != before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_are_no_numbers_are_refused_by_name(copied, number: float, dtype: torch.dtype, form: str) -> None:
    folder = copied("tiny_llama")
    file = folder / "model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    name = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][2, 3] = number
    if form == "bin":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity in 1 of"):
        reload(folder)


@given(
    place=st.integers(0, 63),
    number=st.floats(allow_nan=True, allow_infinity=True, width=16),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64]),
)
def test_every_number_that_is_none_is_found_and_no_other(place: int, number: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(8, 8)
    tensor.view(-1)[place] = number
    tensor = tensor.to(dtype)
    if torch.isfinite(tensor.float()).all():
        require_finite(tensor, "w", "file")
    else:
        with pytest.raises(CheckpointError, match="file: tensor w holds"):
            require_finite(tensor, "w", "file")


def todays_revision(folder: Path) -> str:
    """The revision that records and caches know: settings, tokenizer, and weights of usual names."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    whole = hashlib.sha256()
    for file in (*(folder / name for name in names), *weights):
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:16]


def change_weights(file: Path) -> None:
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)


@pytest.mark.parametrize("form", ["one file", "shards", "pickle", "pickled shards"])
def test_a_usual_folder_keeps_the_revision_that_records_name(copied, form: str) -> None:
    folder = copied("tiny_llama")
    if form == "shards":
        shard(folder, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json", save_file)
    elif form == "pickled shards":
        shard(folder, "pytorch_model-{:05}-of-00002.bin", "pytorch_model.bin.index.json", torch.save)
    elif form == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert (folder / "special_tokens_map.json").is_file()
    assert open_checkpoint(folder).revision == todays_revision(folder)


@pytest.mark.parametrize("name", ["part{}.safetensors", "decoder-{:05}-of-00002.safetensors"])
def test_shards_of_any_name_are_in_the_revision(copied, name: str) -> None:
    folder = copied("tiny_llama")
    shard(folder, name, "model.safetensors.index.json", save_file)
    (folder / "model-old.safetensors").write_bytes(b"a usual name that no index names")
    checkpoint = open_checkpoint(folder)
    before = checkpoint.revision
    checkpoint.require_unchanged()
    change_weights(folder / name.format(2))
    assert open_checkpoint(folder).revision != before
    with pytest.raises(CheckpointError, match="its files have changed"):
        checkpoint.require_unchanged()


def test_pickled_shards_of_any_name_are_in_the_revision(copied) -> None:
    folder = copied("tiny_llama")
    shard(folder, "part{}.bin", "pytorch_model.bin.index.json", torch.save)
    before = open_checkpoint(folder).revision
    torch.save({name: 2 * tensor for name, tensor in torch.load(folder / "part1.bin").items()}, folder / "part1.bin")
    assert open_checkpoint(folder).revision != before


def test_a_pickle_that_is_read_beside_other_files_is_in_the_revision(copied) -> None:
    folder = copied("tiny_llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-of-something-else.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    before = open_checkpoint(folder).revision
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).revision != before


def test_an_index_that_names_other_shards_is_another_revision(copied) -> None:
    folder = copied("tiny_llama")
    shard(folder, "part{}.safetensors", "model.safetensors.index.json", save_file)
    shutil.copy(folder / "part1.safetensors", folder / "copy1.safetensors")
    before = open_checkpoint(folder).revision
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("part1", "copy1"))
    assert open_checkpoint(folder).revision != before


def test_weights_of_a_dense_layer_have_any_name(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "model", LAYOUTS["google/embeddinggemma-300m"])
    usual = open_checkpoint(folder)
    dense = next(file.parent for file in usual.files if "Dense" in file.parent.name)
    (dense / "model.safetensors").rename(dense / "layer.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(dense / "layer.safetensors"), "layer.safetensors")}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    before = checkpoint.revision
    change_weights(dense / "layer.safetensors")
    assert open_checkpoint(folder).revision != before
    with pytest.raises(CheckpointError, match="its files have changed"):
        checkpoint.require_unchanged()


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
def test_a_map_of_special_tokens_is_in_the_revision_where_it_alone_names_one(copied, key: str) -> None:
    folder = copied("tiny_llama")
    other = {"bos_token": "<bos>", "eos_token": "<eos>"}[key]
    names, settings = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
    before = open_checkpoint(folder).revision
    rewrite(names, **{key: other})
    assert open_checkpoint(folder).revision == before  # tokenizer_config.json wins
    content = json.loads(settings.read_text())
    del content[key]
    settings.write_text(json.dumps(content))
    checkpoint = open_checkpoint(folder)
    alone = checkpoint.revision
    assert names in checkpoint.files
    rewrite(names, **{key: content[{"bos_token": "eos_token", "eos_token": "bos_token"}[key]]})
    again = open_checkpoint(folder)
    assert (again.tokenizer.bos_id, again.tokenizer.eos_id) != (
        checkpoint.tokenizer.bos_id,
        checkpoint.tokenizer.eos_id,
    )
    assert again.revision != alone
    with pytest.raises(CheckpointError, match="its files have changed"):
        checkpoint.require_unchanged()
    rewrite(names, **{key: "a token that the vocabulary does not have"})
    assert names not in open_checkpoint(folder).files
