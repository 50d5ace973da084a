"""Files by path, folder, glob and URL; objects are there whole or not at all; an object store may fail on the way."""

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from hypothesis import given
from hypothesis import strategies as st

from tests.bulk.s3 import FaultyProxy, s3_server, url
from unmask.bulk import chunks as chunks_module
from unmask.bulk import units as units_module
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.parts import read_status
from unmask.bulk.storage import Store, find_inputs, public_name
from unmask.encoder.encoder import Encoder
from unmask.errors import StorageError, UsageError

TEXTS = [f"Row {i}: " + "the river, übersetzt " * (i % 5) for i in range(45)]


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    (folder / "data" / "in" / "2026").mkdir(parents=True)
    (folder / "data" / "in" / "a.txt").write_text("".join(text + "\n" for text in TEXTS))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:10])
    (folder / "data" / "in" / "2026" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "data" / "in" / "_SUCCESS").write_text("")
    return folder


@pytest.fixture(scope="module")
def s3(buckets: Path) -> Iterator[int]:
    with s3_server(buckets) as port, pytest.MonkeyPatch.context() as patch:
        # As docs/how-to/encode-files.md says for stores that do not know the checksums of newer SDKs.
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        yield port


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(units_module, "UNIT_CHUNKS", 2)


def names_of(*names: str, input_format: str | None = None) -> list[str]:
    return [file.name for file in find_inputs(names, input_format)[0]]


def test_local_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "in/z.csv", "in/deep/y.jsonl.gz", "in/notes.md", "in/_temporary/x.txt", "in/.h.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x\n")
    assert names_of("b.txt", "a.txt") == ["b.txt", "a.txt"]  # in the order given
    assert names_of("*.txt") == ["a.txt", "b.txt"]
    assert names_of("in/**/*.gz", "a.txt") == ["in/deep/y.jsonl.gz", "a.txt"]
    files, left_out = find_inputs(["in"])
    assert [file.name for file in files] == ["in/deep/y.jsonl.gz", "in/z.csv"]
    assert left_out == ("in/notes.md",)
    assert names_of("in", input_format="txt") == ["in/deep/y.jsonl.gz", "in/notes.md", "in/z.csv"]
    Path("odd[1].txt").write_text("x\n")
    assert names_of("odd[1].txt") == ["odd[1].txt"]
    Path("empty").mkdir()
    for bad_name, message in (
        (["none.txt"], "cannot read none.txt"),
        (["*.csv"], "no file matches"),
        (["empty"], "empty is a folder without files"),
        (["a.txt", "*.txt"], r"a\.txt is named twice, the second time by \*\.txt"),
        (["-", "a.txt"], "standard input"),
        (["ftp://host/a.txt"], "ftp://host/a.txt: no such storage"),
    ):
        with pytest.raises(UsageError, match=message):
            find_inputs(bad_name)


def test_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "real").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for file in (folder / "real" / "a.txt", elsewhere / "b.txt", elsewhere / "deep" / "c.txt"):
        file.write_text("x\n")
    (folder / "again").symlink_to(folder / "real")
    (folder / "all").symlink_to(folder)  # a loop
    (folder / "more").symlink_to(elsewhere)
    (folder / "more again").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(elsewhere / "b.txt")
    (folder / "_hidden").symlink_to(elsewhere)
    names = [Path(name).relative_to(folder).as_posix() for name in names_of(str(folder))]
    assert names == ["file.txt", "more/b.txt", "more/deep/c.txt", "real/a.txt"]


@pytest.mark.parametrize("name", ["in", "in/*.txt"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/a.txt").write_text("x\n")
    Path("in/.#b.txt").symlink_to("nobody@host")  # an editor's lock
    assert names_of(name) == ["in/a.txt"]
    Path("in/c.txt").symlink_to("gone.txt")
    with pytest.raises(UsageError, match=r"in/c\.txt is a link to gone\.txt, which is not there"):
        names_of(name)


@pytest.mark.parametrize("output", ["out/", "out.npy"])
def test_names_and_instructions_that_are_not_utf8_are_named_before_a_model_is_loaded(
    tmp_path: Path, encoder: Encoder, output: str
) -> None:
    def load() -> Encoder:
        raise AssertionError("the model is loaded")

    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "in" / name).write_text("x\n")
    job = EncodeJob((str(tmp_path / "in"),), f"{tmp_path}/{output}")
    for source in (job.inputs[0], f"{tmp_path}/in/*.txt", f"{tmp_path}/in/{name}"):
        with pytest.raises(UsageError, match=r"the file name '.*/in/caf\\udce9\.txt' is not UTF-8; rename the file"):
            run(replace(job, inputs=(source,)), load)
    (tmp_path / "in" / name).rename(tmp_path / "in" / "café.txt")
    with pytest.raises(UsageError, match=r"--instruction 'caf\\udce9' is not UTF-8"):
        run(replace(job, instruction=os.fsdecode(b"caf\xe9")), load)
    assert run(job, lambda: encoder).rows == 1


def test_a_folder_of_no_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="no file of texts there"):
        find_inputs([str(tmp_path)])


@given(user=st.text("abc:/", max_size=5), password=st.text("abc:/+", min_size=1, max_size=9))
def test_a_name_for_messages_has_no_password(user: str, password: str) -> None:
    from urllib.parse import quote

    secret = quote(password, safe="") + "SECRET"
    location = f"s3://{quote(user, safe='')}:{secret}@bucket/in/a.txt?endpoint_override=h&token={secret}"
    assert public_name(location) == "s3://bucket/in/a.txt"
    assert public_name("a/b.txt") == "a/b.txt"


def test_a_local_store_writes_whole_objects(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new"))
    assert store.get("a/b") is None and store.names() == []
    store.put("a/b", b"one")
    store.put("a/b", b"two")
    store.put("c", b"")
    assert (store.get("a/b"), store.get("c"), store.names(), store.names("a")) == (b"two", b"", ["a/b", "c"], ["a/b"])
    store.remove("c")
    store.remove("c")
    assert store.names() == ["a/b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Store(str(tmp_path / "file")).put("a", b"x")


def test_an_object_store_lists_and_keeps_objects(s3: int) -> None:
    assert names_of(url(s3, "data/in")) == ["s3://data/in/2026/b.jsonl.gz", "s3://data/in/a.txt"]
    assert names_of(url(s3, "data/in/*.txt")) == ["s3://data/in/a.txt"]
    assert names_of(url(s3, "data/in/**/*.gz")) == ["s3://data/in/2026/b.jsonl.gz"]
    assert names_of(url(s3, "data/in/a.txt")) == ["s3://data/in/a.txt"]
    store = Store(url(s3, "data/store"))
    assert store.get("a/b") is None and store.names() == []
    store.put("a/b", b"one")
    store.put("a/b", b"two" * 1000)
    assert store.get("a/b") == b"two" * 1000 and store.names() == ["a/b"]
    store.remove("a/b")
    store.remove("a/b")
    assert store.get("a/b") is None
    for name, message in (("data/none", "nothing is at s3://data/none"), ("data/in/*.csv", "no file matches")):
        with pytest.raises(UsageError, match=message):
            find_inputs([url(s3, name)])


def test_a_wrong_key_is_one_sentence_without_the_key(s3: int) -> None:
    with pytest.raises(StorageError, match="cannot list s3://data/in") as caught:
        find_inputs([url(s3, "data/in", secret="wrong-secret")])
    assert "\n" not in str(caught.value) and "wrong-secret" not in str(caught.value)


def test_a_job_through_an_object_store_has_the_bytes_of_a_local_one(
    tmp_path: Path, buckets: Path, s3: int, encoder: Encoder
) -> None:
    job = EncodeJob((url(s3, "data/in"),), url(s3, "data/out"))
    assert run(job, lambda: encoder).rows == 55
    status = read_status(job.output)
    assert (status.state, status.tally.rows) == ("complete", 55)
    assert "secret" not in "".join(file.read_text() for file in (buckets / "data" / "out" / "_unmask").rglob("*.json"))
    local = replace(job, output=f"{tmp_path}/out/")
    run(local, lambda: encoder)
    assert read_status(local.output).sha256 == status.sha256
    with pytest.raises(UsageError, match=r"s3://data/out is complete already"):
        run(job, lambda: encoder)


def test_refusals_and_cut_connections_on_the_way_leave_no_short_object(
    buckets: Path, s3: int, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.bulk.storage._PAUSES", (0.0,) * 4)
    proxy = FaultyProxy(s3)
    try:
        job = EncodeJob((url(s3, "data/in"),), url(proxy.port, "data/faulty"))
        assert run(job, lambda: encoder).rows == 55
    finally:
        proxy.close()
    assert proxy.refused > 0 and proxy.cut > 0
    whole = EncodeJob((url(s3, "data/in"),), url(s3, "data/whole"))
    run(whole, lambda: encoder)
    assert read_status(url(s3, "data/faulty")).sha256 == read_status(whole.output).sha256
    for part in (buckets / "data" / "whole").glob("part-*"):
        assert (buckets / "data" / "faulty" / part.name).read_bytes() == part.read_bytes()


@pytest.mark.parametrize("kind", ["path", "link", "s3"])
def test_parts_inside_the_input_folder_are_no_input(
    tmp_path: Path, request: pytest.FixtureRequest, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "in"
    source, output = str(folder), f"{folder}/vectors/"
    if kind == "link":
        (tmp_path / "link").symlink_to(folder)
        output = f"{tmp_path}/link/vectors/"
    elif kind == "s3":
        port = request.getfixturevalue("s3")
        source, output = url(port, "data/inside"), url(port, "data/inside/vectors")
    Store(source).put("a.jsonl", b'{"text": "a"}\n')
    job = EncodeJob((source,), output, output_format="jsonl")
    put = Store.put

    def interrupted(store: Store, name: str, content: bytes) -> None:
        put(store, name, content)
        if name.startswith("part-"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job, lambda: encoder)
    assert len(names_of(source)) == 2
    assert run(job, lambda: encoder).rows == 1
    if kind != "s3":  # the test's server cannot remove a file in a folder of others
        assert run(replace(job, restart=True), lambda: encoder).rows == 1


def test_only_parts_of_the_output_are_no_input(tmp_path: Path) -> None:
    for name in ("a.txt", "part-a.txt", "vectors/b.txt", "vectors/part-b.txt", "vectors/deep/part-c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x\n")
    folder = str(tmp_path / "in")

    def names(source: str, output: str) -> list[str]:
        return [Path(file.name).name for file in find_inputs([source], output=output)[0]]

    everything = ["a.txt", "part-a.txt", "b.txt", "part-c.txt", "part-b.txt"]
    for output in ("-", "vectors/", f"{folder}/vector/", f"{folder}/a.txt", f"s3:/{folder}/vectors"):
        assert names(folder, output) == names(f"file://{folder}", output) == everything
    for output in (f"{folder}/vectors", f"file://{folder}/vectors/"):
        assert names(folder, output) == names(f"file://{folder}", output) == everything[:-1]


def test_a_file_of_the_hub_is_read_by_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's filesystem is replaced by a local folder in its layout."""
    (tmp_path / "datasets" / "org" / "name").mkdir(parents=True)
    (tmp_path / "datasets" / "org" / "name" / "train.txt").write_text("one\ntwo\n")
    hub = DirFileSystem(path=str(tmp_path), fs=fsspec.filesystem("file"))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: hub)
    files, _ = find_inputs(["hf://datasets/org/name"])
    assert [file.name for file in files] == ["hf://datasets/org/name/train.txt"]
    with files[0].open() as stream:
        assert stream.read() == b"one\ntwo\n"
