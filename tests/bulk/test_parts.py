"""Outputs in parts: the same bytes however often a run was killed, and nothing counts without its manifest."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.bulk.processes import encoding_parts
from unmask.bulk import chunks as chunks_module
from unmask.bulk import units as units_module
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.parts import read_manifests, read_status
from unmask.bulk.report import EncodeReport
from unmask.bulk.storage import Store
from unmask.bulk.units import Manifest, UnitEncoder
from unmask.encoder.encoder import Encoder
from unmask.errors import EmptyText, StorageError, UsageError

ROOT = Path(__file__).parent.parent.parent
A = [f"Row {i}: " + "the river, übersetzt " * (i % 5) for i in range(45)]
B = [f"{i} of the second file" for i in range(19)]


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 rows and units of 2 chunks: 6 units of the first file, 3 of the second."""
    monkeypatch.setattr(chunks_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(units_module, "UNIT_CHUNKS", 2)


@pytest.fixture
def job(tmp_path: Path) -> EncodeJob:
    write(tmp_path / "in" / "a.txt", A)
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in B))
    (tmp_path / "in" / "README.md").write_text("not a table")
    return EncodeJob((str(tmp_path / "in"),), f"{tmp_path}/out/")


def write(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(text + "\n" for text in texts))


def parts_of(output: str) -> dict[str, str]:
    """Names and digests of the parts."""
    folder = Path(output)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("part-*"))}


def launch(job: EncodeJob, encoder: Encoder) -> EncodeReport:
    return run(job, lambda: encoder)


def test_parts_hold_each_row_once_beside_its_file_and_place(job: EncodeJob, encoder: Encoder) -> None:
    report = launch(job, encoder)
    assert (report.rows, report.resumed_at, report.processors) == (64, 0, 1)
    assert [Path(name).name for name in report.left_out] == ["README.md"]
    tables = [pq.read_table(file) for file in sorted(Path(job.output).glob("part-*.parquet"))]
    assert [len(table) for table in tables] == [8, 8, 8, 8, 8, 5, 8, 8, 3]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(Path(row["file"]).name, row["index"]) for row in rows] == [
        *(("a.txt", i) for i in range(45)), *(("b.jsonl", i) for i in range(19))]  # fmt: skip
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert np.abs(vectors - encoder.encode([*A, *B])).max() < 1e-6


@pytest.mark.parametrize("target", ["npy", "jsonl"])
def test_other_formats(job: EncodeJob, encoder: Encoder, target: str) -> None:
    launch(replace(job, output_format=target), encoder)
    files = sorted(Path(job.output).glob(f"part-*.{target}"))
    assert len(files) == 9
    if target == "npy":
        vectors = np.concatenate([np.load(file) for file in files])
    else:
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        vectors = np.array([row["embedding"] for row in rows], np.float32)
        assert (Path(rows[-1]["file"]).name, rows[-1]["index"]) == ("b.jsonl", 18)
    assert np.abs(vectors - encoder.encode([*A, *B])).max() < 1e-6


def test_several_inputs_into_one_file_have_the_vectors_of_the_parts(
    tmp_path: Path, job: EncodeJob, encoder: Encoder
) -> None:
    launch(replace(job, output_format="npy"), encoder)
    launch(replace(job, output=str(tmp_path / "all.npy")), encoder)
    parts = np.concatenate([np.load(file) for file in sorted(Path(job.output).glob("part-*"))])
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), parts)


@pytest.mark.parametrize("point", ["before the part", "after the part", "after the manifest"])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, job: EncodeJob, encoder: Encoder, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(job, output=f"{tmp_path}/whole/")
    launch(whole, encoder)
    put, calls = Store.put, []

    def interrupted(store: Store, name: str, content: bytes) -> None:
        calls.append(name)
        is_part = name.startswith("part-00000-00000003")
        if is_part and point == "before the part":
            raise KeyboardInterrupt
        put(store, name, content)
        if (is_part and point == "after the part") or (
            name.endswith("units/00000-00000003.json") and point == "after the manifest"
        ):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(job, encoder)
    assert read_status(job.output).state == "unfinished"
    report = launch(job, encoder)
    assert report.resumed_at == (32 if point == "after the manifest" else 24)
    assert report.rows == 64
    assert parts_of(job.output) == parts_of(whole.output)
    assert read_status(job.output).sha256 == read_status(whole.output).sha256
    assert not (Path(job.output) / "_unmask" / "lock").exists()


def test_killed_at_any_moment(tmp_path: Path, job: EncodeJob, golden_dir: Path, encoder: Encoder) -> None:
    launch(replace(job, output=f"{tmp_path}/whole/"), encoder)
    for after in (3, 8):
        with encoding_parts(job, golden_dir / "tiny_llama") as names:
            for _ in range(after):
                names.recv()
    launch(job, encoder)
    assert parts_of(job.output) == parts_of(f"{tmp_path}/whole/")


def test_an_error_in_a_text_fails_its_unit_and_no_other(job: EncodeJob, encoder: Encoder) -> None:
    write(Path(job.inputs[0]) / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText, match=r"row 11 \(index 10\) is empty.* All other units are done"):
        launch(job, encoder)
    status = read_status(job.output)
    assert (status.units, status.tally.rows, status.state) == (8, 56, "unfinished")
    report = launch(replace(job, on_empty="null"), encoder)
    assert (report.rows, report.empty, report.resumed_at) == (64, 1, 56)


def test_changed_inputs_and_options_are_refused(job: EncodeJob, encoder: Encoder) -> None:
    folder = Path(job.inputs[0])
    write(folder / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText):
        launch(job, encoder)
    with pytest.raises(UsageError, match="normalize=False, and this one has normalize=True"):
        launch(replace(job, normalize=True), encoder)
    before = (folder / "a.txt").read_text()
    write(folder / "a.txt", A)
    with pytest.raises(UsageError, match=r"the inputs have changed: .*a\.txt \([0-9,]+ bytes\) where this one has"):
        launch(job, encoder)
    (folder / "a.txt").write_text(before.replace("Row 20", "Row XX"))  # as many bytes as before
    with pytest.raises(UsageError, match=r"a\.txt has changed: its rows 17 to 24"):
        launch(job, encoder)
    (folder / "a.txt").write_text(before)
    write(folder / "c.txt", B)
    with pytest.raises(UsageError, match=r"had none where this one has .*c\.txt"):
        launch(job, encoder)
    write(folder / "a.txt", A)
    assert launch(replace(job, restart=True), encoder).resumed_at == 0


def test_a_complete_output_and_a_foreign_folder_are_left_alone(
    tmp_path: Path, job: EncodeJob, encoder: Encoder
) -> None:
    launch(job, encoder)
    before = parts_of(job.output)
    with pytest.raises(UsageError, match="is complete already"):
        launch(job, encoder)
    assert parts_of(job.output) == before
    write(tmp_path / "other" / "mine.txt", ["a"])
    with pytest.raises(UsageError, match=r"other holds other files, such as mine\.txt"):
        launch(replace(job, output=str(tmp_path / "other")), encoder)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["mine.txt"]


def norms(output: str) -> set[bool]:
    """Return {True} if all vectors of an output have length 1, {False} if none has, and both in a mixture."""
    lengths = np.concatenate([np.linalg.norm(np.load(file), axis=1) for file in Path(output).glob("part-*.npy")])
    return set(np.isclose(lengths, 1, atol=1e-3).tolist())


@pytest.mark.parametrize("removed", [0, 2, 9, 12, 19])
def test_a_restart_that_stops_anywhere_mixes_no_vectors(
    job: EncodeJob, encoder: Encoder, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, output_format="npy")
    launch(job, encoder)
    assert norms(job.output) == {False}
    remove, calls = Store.remove, []

    def interrupted(store: Store, name: str) -> None:
        if len(calls) == removed:
            raise KeyboardInterrupt
        calls.append(name)
        remove(store, name)

    scaled = replace(job, normalize=True)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(replace(scaled, restart=True), encoder)
    with pytest.raises(UsageError, match="add --restart"):
        launch(scaled, encoder)
    launch(replace(scaled, restart=True), encoder)
    assert norms(job.output) == {True}


def test_a_restart_removes_what_another_run_wrote_while_it_waited(
    job: EncodeJob, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, output_format="npy")
    names, listed = Store.names, []

    def late(store: Store, folder: str = "") -> list[str]:
        before = names(store, folder)
        if not listed:
            listed.append(folder)
            with pytest.raises(UsageError, match="another run is writing"):
                launch(job, encoder)
        return before

    monkeypatch.setattr(Store, "names", late)
    launch(replace(job, normalize=True, restart=True), encoder)
    assert listed == [""] and norms(job.output) == {True}


def test_manifests_of_other_options_are_refused_without_their_job(job: EncodeJob, encoder: Encoder) -> None:
    write(Path(job.inputs[0]) / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText):
        launch(job, encoder)
    (Path(job.output) / "_unmask" / "job.json").unlink()
    with pytest.raises(UsageError, match=r"units/00000-00000000\.json was written with other options.* --restart"):
        launch(replace(job, normalize=True, on_empty="null"), encoder)


def test_manifests_of_an_earlier_version_are_counted_and_not_gone_on_with(job: EncodeJob, encoder: Encoder) -> None:
    write(Path(job.inputs[0]) / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText):
        launch(job, encoder)
    for file in (Path(job.output) / "_unmask" / "units").iterdir():
        manifest = json.loads(file.read_text())
        del manifest["options_sha256"]
        file.write_text(json.dumps(manifest))
    assert read_status(job.output).units == 8
    with pytest.raises(UsageError, match=r"by an earlier version of unmask: .* add --restart"):
        launch(replace(job, on_empty="null"), encoder)
    assert launch(replace(job, on_empty="null", restart=True), encoder).rows == 64


def test_one_run_at_a_time(job: EncodeJob, encoder: Encoder) -> None:
    def load() -> Encoder:
        with pytest.raises(UsageError, match="another run is writing"):
            launch(job, encoder)
        return encoder

    assert run(job, load).rows == 64


def test_another_kind_of_processor_is_counted_and_may_be_refused(job: EncodeJob, encoder: Encoder) -> None:
    write(Path(job.inputs[0]) / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText):
        launch(job, encoder)
    file = next((Path(job.output) / "_unmask" / "units").iterdir())
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"probe": "0" * 16, "worker": "elsewhere:1"}))
    with pytest.raises(UsageError, match=r"another kind of processor, on elsewhere:1"):
        launch(replace(job, same_bits=True, on_empty="null"), encoder)
    assert launch(replace(job, on_empty="null"), encoder).processors == 2


def test_a_damaged_manifest_is_named(job: EncodeJob, encoder: Encoder) -> None:
    write(Path(job.inputs[0]) / "a.txt", [*A[:10], "", *A[11:]])
    with pytest.raises(EmptyText):
        launch(job, encoder)
    (Path(job.output) / "_unmask" / "units" / "00001-00000000.json").write_text("{")
    with pytest.raises(StorageError, match=r"00001-00000000\.json is damaged .*remove it"):
        launch(job, encoder)


def test_a_manifest_names_the_part_as_it_is(job: EncodeJob, encoder: Encoder) -> None:
    launch(job, encoder)
    store = Store(job.output)
    manifests = read_manifests(store)
    assert sorted(manifests) == [f"00000-{i:08d}" for i in range(6)] + [f"00001-{i:08d}" for i in range(3)]
    for manifest in manifests.values():
        assert isinstance(manifest, Manifest)
        content = store.get(manifest.part)
        assert content is not None
        assert (len(content), hashlib.sha256(content).hexdigest()) == (manifest.bytes, manifest.sha256)
    assert len({manifest.probe for manifest in manifests.values()}) == 1
    assert UnitEncoder(job, encoder, store).probe == next(iter(manifests.values())).probe


def test_no_texts_are_a_complete_output_without_parts(tmp_path: Path, encoder: Encoder) -> None:
    write(tmp_path / "empty.txt", [])
    job = EncodeJob((str(tmp_path / "empty.txt"),), f"{tmp_path}/out/")
    assert launch(job, encoder).rows == 0
    assert read_status(job.output).state == "complete"
    with pytest.raises(UsageError, match="holds no parts"):
        read_status(str(tmp_path / "nowhere"))


def test_the_command_line(
    tmp_path: Path, job: EncodeJob, golden_dir: Path, unmask: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    command = [sys.executable, "-m", "unmask", "encode", job.inputs[0], "-o", job.output]
    command += ["--model", str(golden_dir / "tiny_llama"), "--price-per-hour", "3600"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "64 texts" in done.stderr
    cost = re.search(r"cost: (\S+) hours of workers, \$(\S+), \$\S+ per million tokens", done.stderr)
    assert cost is not None
    assert float(cost[2]) == pytest.approx(3600 * float(cost[1]), rel=0.01) and float(cost[2]) > 0
    assert "left out" in done.stderr and "README.md" in done.stderr
    status = unmask("encode", "--status", job.output, "--json")
    counts = json.loads(status.stdout)
    assert (counts["state"], counts["rows"], counts["units"]) == ("complete", 64, 2)
    assert counts["sha256"] in unmask("encode", "--status", job.output).stdout
    for arguments, message in (
        ((job.inputs[0],), "no output: add --output"),
        (("-o", job.output), "no input: name files"),
        (("--status", str(tmp_path / "none")), "holds no parts"),
    ):
        refusal = unmask("encode", *arguments)
        assert refusal.returncode == 1 and message in refusal.stderr
