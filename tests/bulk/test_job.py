"""A bulk run gives what `Encoder.encode` gives, and the same bytes however often it was killed."""

import io
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bulk.processes import encoding, resumed_at
from unmask.bulk import chunks as chunks_module
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import INPUT_FORMATS, NPY_HEADER_BYTES, OUTPUT_FORMATS
from unmask.bulk.job import EncodeProgress, EncodeReport, run
from unmask.bulk.spool import Spool
from unmask.encoder.encoder import Encoder
from unmask.errors import CheckpointError, EmptyText, StorageError, TextTooLong, UsageError

CHUNK = 8
TEXTS = [f"Row {i}: " + "the river, übersetzt " * (i % 5) for i in range(45)]

Launch = Callable[..., EncodeReport]


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_ROWS", CHUNK)


@pytest.fixture
def job(tmp_path: Path) -> EncodeJob:
    (tmp_path / "in.txt").write_text("".join(text + "\n" for text in TEXTS))
    return EncodeJob((str(tmp_path / "in.txt"),), str(tmp_path / "out.npy"))


@pytest.fixture
def launch(encoder: Encoder) -> Launch:
    def start(job: EncodeJob, progress: Callable[[EncodeProgress], None] | None = None) -> EncodeReport:
        return run(job, lambda: encoder, progress)

    return start


class StopAfter:
    """Interrupts the run once so many chunks are recorded."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks

    def __call__(self, progress: EncodeProgress) -> None:
        if progress.seconds == 0.0:
            return  # the call before the first chunk
        self._chunks -= 1
        if self._chunks == 0:
            raise KeyboardInterrupt


def interrupt(launch: Launch, job: EncodeJob, chunks: int = 3) -> Path:
    """Stop a run after some chunks. Returns its spool."""
    with pytest.raises(KeyboardInterrupt):
        launch(job, StopAfter(chunks))
    output = Path(job.output)
    return output.with_name(f".{output.name}.partial")


def write_texts(file: Path, texts: list[str]) -> None:
    match file.suffix:
        case ".txt":
            file.write_text("".join(text + "\n" for text in texts))
        case ".jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".csv":
            file.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
        case ".tsv":
            file.write_text("text\n" + "".join(f"{text}\n" for text in texts))
        case ".parquet":
            pq.write_table(pa.table({"text": texts}), file)


def read_vectors(file: Path) -> np.ndarray:
    match file.suffix:
        case ".npy":
            return np.load(file)
        case ".parquet":
            rows = pq.read_table(file)["embedding"].to_pylist()
        case _:
            rows = [json.loads(line)["embedding"] for line in file.read_text().splitlines()]
    width = next(len(row) for row in rows if row is not None)
    return np.array([row or [np.nan] * width for row in rows], dtype=np.float32)


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
@pytest.mark.parametrize("source", INPUT_FORMATS)
def test_vectors_are_those_of_encode(
    tmp_path: Path, encoder: Encoder, launch: Launch, source: str, target: str
) -> None:
    file, output = tmp_path / f"in.{source}", tmp_path / "new" / f"out.{target}"
    write_texts(file, TEXTS)
    report = launch(EncodeJob((str(file),), str(output)))
    assert np.abs(read_vectors(output) - encoder.encode(TEXTS)).max() < 1e-6
    assert report.rows == len(TEXTS)
    assert report.tokens == encoder.count_tokens(TEXTS).sum()
    assert (report.truncated, report.empty, report.resumed_at) == (0, 0, 0)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name], "no spool is left"


def test_options_reach_the_vectors(job: EncodeJob, encoder: Encoder, launch: Launch) -> None:
    launch(replace(job, instruction="Find rivers:", normalize=True, dimensions=7))
    expected = encoder.encode(TEXTS, instruction="Find rivers:", normalize=True, dimensions=7)
    assert np.abs(np.load(job.output) - expected).max() < 1e-6


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
def test_no_rows_is_an_output_without_rows(tmp_path: Path, job: EncodeJob, launch: Launch, target: str) -> None:
    Path(job.inputs[0]).write_text("")
    output = tmp_path / f"out.{target}"
    assert launch(replace(job, output=str(output))).rows == 0
    match target:
        case "npy":
            assert np.load(output).shape == (0, 64)
        case "parquet":
            assert pq.read_table(output).num_rows == 0
        case _:
            assert output.read_bytes() == b""


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
def test_standard_streams(
    tmp_path: Path,
    job: EncodeJob,
    launch: Launch,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    file = tmp_path / f"out.{target}"
    launch(replace(job, output=str(file)))
    with io.TextIOWrapper(io.BytesIO(Path(job.inputs[0]).read_bytes())) as piped:
        monkeypatch.setattr("sys.stdin", piped)
        launch(replace(job, inputs=("-",), output="-", output_format=target))
    assert capsysbinary.readouterr().out == file.read_bytes()


def test_empty_text_is_an_error_that_names_its_row(job: EncodeJob, launch: Launch) -> None:
    write_texts(Path(job.inputs[0]), [*TEXTS[:20], "", *TEXTS[20:]])
    with pytest.raises(EmptyText, match=r"in\.txt: row 21 \(index 20\) is empty; .*--on-empty null") as caught:
        launch(job)
    assert caught.value.index == 20


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
def test_empty_texts_become_null(tmp_path: Path, job: EncodeJob, encoder: Encoder, launch: Launch, target: str) -> None:
    holes = {0, 20, *range(24, 32)}  # the last are a chunk of nothing else
    write_texts(Path(job.inputs[0]), ["" if i in holes else text for i, text in enumerate(TEXTS)])
    output = tmp_path / f"out.{target}"
    report = launch(replace(job, output=str(output), on_empty="null", normalize=True))
    assert (report.rows, report.empty) == (len(TEXTS), len(holes))
    vectors = read_vectors(output)
    assert set(np.flatnonzero(np.isnan(vectors).all(axis=1)).tolist()) == holes
    texts_left = [i for i in range(len(TEXTS)) if i not in holes]
    assert np.abs(vectors[texts_left] - encoder.encode([TEXTS[i] for i in texts_left], normalize=True)).max() < 1e-6


def test_long_texts_are_cut_and_counted_or_refused(job: EncodeJob, encoder: Encoder, launch: Launch) -> None:
    texts = [*TEXTS[:10], "river " * 2000, *TEXTS[10:]]
    write_texts(Path(job.inputs[0]), texts)
    tokens = encoder.count_tokens(texts)[10]
    with pytest.raises(TextTooLong, match=rf"row 11 \(index 10\) has {tokens:,} tokens, .* 512;") as caught:
        launch(replace(job, on_long="error"))
    assert caught.value.index == 10
    report = launch(job)  # as the message advised
    assert (report.truncated, report.resumed_at) == (1, CHUNK)
    assert np.abs(np.load(job.output) - encoder.encode(texts)).max() < 1e-6


def test_vectors_that_are_not_finite_are_refused(
    job: EncodeJob, encoder: Encoder, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(prompts: list[Any]) -> np.ndarray:
        vectors = np.ones((len(prompts), encoder.dim), np.float32)
        vectors[3, 5] = np.inf
        return vectors

    monkeypatch.setattr(encoder, "encode_prompts", overflow)
    with pytest.raises(CheckpointError, match=r"row 4 of .*in\.txt a vector with NaN or infinity"):
        launch(job)


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path: Path, job: EncodeJob) -> None:
    def load() -> Encoder:
        raise AssertionError("loaded")

    (tmp_path / "in.csv").write_text("body\na\n")
    (tmp_path / "in.xml").write_text("<a/>")
    table = replace(job, inputs=(str(tmp_path / "in.csv"),))
    (tmp_path / "out.npy").write_bytes(b"finished")
    for change, message in (
        (replace(job, inputs=(str(tmp_path / "nothing.txt"),)), "cannot read"),
        (replace(job, output=str(tmp_path / "out.xml")), "add --output-format"),
        (replace(job, inputs=(str(tmp_path / "in.xml"),)), "add --input-format"),
        (replace(table, output=str(tmp_path / "other.npy")), "no column 'text'"),
        (job, "exists already; choose another --output, or add --restart"),
        (replace(job, output=str(tmp_path)), "holds other files, such as in.csv"),
        (replace(job, output=f"{tmp_path}/out/", output_format="csv"), "choose one of npy, parquet, jsonl"),
        (replace(job, output=job.inputs[0], output_format="npy", restart=True), "is the input as well"),
    ):
        with pytest.raises(UsageError, match=message):
            run(change, load)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.csv", "in.txt", "in.xml", "out.npy"]


def test_impossible_dimensions_leave_nothing_behind(tmp_path: Path, job: EncodeJob, launch: Launch) -> None:
    with pytest.raises(UsageError, match="dimensions=65"):
        launch(replace(job, dimensions=65))
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
@pytest.mark.parametrize("chunks", [1, 5])
def test_an_interrupted_run_goes_on(tmp_path: Path, job: EncodeJob, launch: Launch, target: str, chunks: int) -> None:
    job = replace(job, output=str(tmp_path / f"out.{target}"))
    whole = replace(job, output=str(tmp_path / f"whole.{target}"))
    unbroken = launch(whole)
    interrupt(launch, job, chunks)
    report = launch(job)
    assert report.resumed_at == chunks * CHUNK
    no_time = {"seconds": 0, "worker_seconds": 0}
    assert replace(report, **no_time, resumed_at=0) == replace(unbroken, **no_time)
    assert Path(job.output).read_bytes() == Path(whole.output).read_bytes()


def test_input_may_grow_while_a_run_is_interrupted(tmp_path: Path, job: EncodeJob, launch: Launch) -> None:
    whole = replace(job, output=str(tmp_path / "whole.npy"))
    launch(whole)
    write_texts(Path(job.inputs[0]), TEXTS[:30])
    interrupt(launch, job, chunks=4)  # the fourth is cut short by the end
    write_texts(Path(job.inputs[0]), TEXTS)
    assert launch(job).resumed_at == 3 * CHUNK
    assert Path(job.output).read_bytes() == Path(whole.output).read_bytes()


@pytest.mark.parametrize(
    "changed", [["other", *TEXTS[1:]], TEXTS[:20], [TEXTS[0] + TEXTS[1][0], TEXTS[1][1:], *TEXTS[2:]]]
)
def test_changed_input_is_refused(job: EncodeJob, launch: Launch, changed: list[str]) -> None:
    interrupt(launch, job)
    write_texts(Path(job.inputs[0]), changed)
    with pytest.raises(UsageError, match=r"in\.txt has changed: its first 24 rows .* --restart"):
        launch(job)
    assert launch(replace(job, restart=True)).resumed_at == 0
    assert len(np.load(job.output)) == len(changed)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"normalize": True}, "was made with normalize=False, and this one has normalize=True"),
        ({}, {"instruction": "Find:"}, "with instruction='', prompt=.* has instruction='Find:', prompt="),
        ({}, {"dimensions": 5}, "dimensions=None, and this one has dimensions=5"),
        ({"on_empty": "null"}, {"on_empty": "error"}, "on_empty='null', and this one has on_empty='error'"),
        ({}, {"on_long": "error"}, "on_long='truncate', and this one has on_long='error'"),
        ({}, {"output_format": "jsonl"}, "output_format='npy', and this one has output_format='jsonl'"),
    ],
)
def test_changed_options_are_refused(
    job: EncodeJob, launch: Launch, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    interrupt(launch, replace(job, **first))
    with pytest.raises(UsageError, match=message):
        launch(replace(job, **{**first, **then}))
    assert launch(replace(job, **first)).resumed_at == 24, "the refusal cost nothing"


def test_an_error_may_be_allowed_after_all(job: EncodeJob, launch: Launch) -> None:
    write_texts(Path(job.inputs[0]), [*TEXTS[:20], "", *TEXTS[20:]])
    with pytest.raises(EmptyText):
        launch(job)
    report = launch(replace(job, on_empty="null"))
    assert (report.resumed_at, report.empty) == (16, 1)


def test_another_model_is_refused(job: EncodeJob, launch: Launch, golden_dir: Path) -> None:
    interrupt(launch, job)
    with pytest.raises(UsageError, match="was made with model="):
        run(job, lambda: Encoder.load(golden_dir / "tiny_gemma"))


def test_another_precision_is_refused(job: EncodeJob, launch: Launch, golden_dir: Path) -> None:
    interrupt(launch, job)
    with pytest.raises(UsageError, match=r"was made with dtype='float32', and this one has dtype='int8, "):
        run(job, lambda: Encoder.load(golden_dir / "tiny_llama", dtype="int8"))


def test_vectors_beyond_the_record_are_dropped(tmp_path: Path, job: EncodeJob, launch: Launch) -> None:
    launch(replace(job, output=str(tmp_path / "whole.npy")))
    spool = interrupt(launch, job)
    with (spool / "vectors").open("ab") as vectors:
        vectors.write(b"half a row")
    assert launch(job).resumed_at == 24
    assert Path(job.output).read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"tally": {}}', b'{"tally": {"rows": 1, "lines": 2}}'])
def test_a_damaged_state_is_refused(job: EncodeJob, launch: Launch, content: bytes) -> None:
    spool = interrupt(launch, job)
    (spool / "state.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"is damaged: state\.json cannot be read .*--restart"):
        launch(job)
    assert launch(replace(job, restart=True)).resumed_at == 0


def test_lost_vectors_are_noticed(job: EncodeJob, launch: Launch) -> None:
    spool = interrupt(launch, job)
    whole = NPY_HEADER_BYTES + 24 * 64 * 4
    assert (spool / "vectors").stat().st_size == whole
    os.truncate(spool / "vectors", whole - 1)
    with pytest.raises(
        StorageError, match=rf"it holds {whole - 1:,} bytes of vectors and should hold {whole:,}; .*--restart"
    ):
        launch(job)
    (spool / "vectors").unlink()
    assert launch(job).resumed_at == 0, "without vectors there is nothing to go on from"


def test_restart_replaces_an_output_and_can_itself_be_resumed(job: EncodeJob, launch: Launch) -> None:
    output = Path(job.output)
    output.write_bytes(b"finished before")
    spool = interrupt(launch, replace(job, restart=True))
    assert output.read_bytes() == b"finished before", "kept until there is a whole new one"
    assert launch(job).resumed_at == 24
    assert len(np.load(output)) == len(TEXTS)
    assert not spool.exists()


def test_an_output_that_appeared_meanwhile_is_not_replaced(job: EncodeJob, launch: Launch) -> None:
    interrupt(launch, job)
    Path(job.output).write_bytes(b"somebody else's")
    with pytest.raises(UsageError, match="exists already"):
        launch(job)
    assert Path(job.output).read_bytes() == b"somebody else's"


def test_two_runs_on_one_output_are_refused(job: EncodeJob, launch: Launch) -> None:
    spool = interrupt(launch, job)
    with closing(Spool(spool, Path(job.output))):
        for restart in (False, True):
            with pytest.raises(UsageError, match="another run is writing"):
                launch(replace(job, restart=restart))
    assert launch(job).resumed_at == 24


@pytest.mark.parametrize(
    ("target", "limit", "rows_left"),
    [("npy", 6000, 16), ("parquet", 12_200, 40), ("jsonl", 20_000, 40)],
    ids=["while encoding", "while writing parquet", "while writing jsonl"],
)
def test_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, job: EncodeJob, launch: Launch, target: str, limit: int, rows_left: int
) -> None:
    launch(replace(job, output=str(tmp_path / f"whole.{target}")))
    job = replace(job, output=str(tmp_path / f"out.{target}"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match=rf"cannot write .*out\.{target}: .*make room and run the same command"):
            launch(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path(job.output).exists()
    assert launch(job).resumed_at == rows_left
    assert Path(job.output).read_bytes() == (tmp_path / f"whole.{target}").read_bytes()


def test_progress_is_reported_before_the_first_chunk_and_after_each(job: EncodeJob, launch: Launch) -> None:
    interrupt(launch, job)
    states: list[EncodeProgress] = []
    report = launch(job, states.append)
    assert [state.rows for state in states] == [24, 32, 40, 45]
    assert {state.total for state in states} == {len(TEXTS)}
    assert states[0].tokens == 0 and states[0].seconds == 0.0
    assert 0 < states[-1].tokens < report.tokens  # the tokens of this run alone


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with an input of 4000 rows, and the outputs of an unbroken run."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "in.txt").write_text("".join(f"{i} {TEXTS[i % 45]}\n" for i in range(4000)))
    with encoding(model, folder / "in.txt", [folder / f"whole.{target}" for target in OUTPUT_FORMATS]) as process:
        process.join()
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("target", OUTPUT_FORMATS)
def test_killed_at_any_moment(folder: Path, model: Path, target: str) -> None:
    output, state = folder / f"out.{target}", folder / f".out.{target}.partial" / "state.json"
    moments = random.Random(target)

    def recorded() -> int:
        return json.loads(state.read_bytes())["tally"]["rows"] if state.exists() else 0

    for _ in range(3):
        before = recorded()
        with encoding(model, folder / "in.txt", [output]) as process:
            while recorded() <= before and process.is_alive():
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.2))
        assert not output.exists(), "killed too late to show anything; give it more rows"
    with encoding(model, folder / "in.txt", [output]) as process:
        process.join()
        assert process.exitcode == 0
    assert resumed_at(output) >= 3 * 64
    assert output.read_bytes() == (folder / f"whole.{target}").read_bytes()


@pytest.mark.parametrize(
    ("target", "step", "row"), [("npy", "state.json.new", 0), ("npy", "vectors", 3968), ("parquet", "finished", 3968)]
)
def test_killed_at_the_worst_moments(
    folder: Path, model: Path, tmp_path: Path, target: str, step: str, row: int
) -> None:
    """Kill before the first record is in place, and before the finished file is."""
    output = tmp_path / f"out.{target}"
    with encoding(model, folder / "in.txt", [output], dies_at=step) as process:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    with encoding(model, folder / "in.txt", [output]) as process:
        process.join()
        assert process.exitcode == 0
    assert resumed_at(output) == row
    assert output.read_bytes() == (folder / f"whole.{target}").read_bytes()


@pytest.mark.parametrize("target", ["npy", "jsonl"])
def test_the_target_of_a_linked_output_is_written(tmp_path: Path, encoder: Encoder, target: Any) -> None:
    source, elsewhere, link = tmp_path / "in.txt", tmp_path / "elsewhere", tmp_path / f"out.{target}"
    source.write_text("a text\n")
    elsewhere.mkdir()
    link.symlink_to(elsewhere / "real")
    for restart in (False, True):
        run(EncodeJob((str(source),), str(link), restart=restart, output_format=target), lambda: encoder)
        assert link.is_symlink() and (elsewhere / "real").stat().st_size > 0
        assert [file.name for file in elsewhere.iterdir()] == ["real"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "in.txt", link.name]


@pytest.mark.parametrize("restart", [False, True])
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, encoder: Encoder, restart: bool) -> None:
    source, pipe = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("a text\n")
    os.mkfifo(pipe)
    (tmp_path / "link.npy").symlink_to(pipe)
    for output in (pipe, tmp_path / "link.npy"):
        with pytest.raises(UsageError, match=r"npy is a device or a pipe, not a file; .* - for standard output"):
            run(EncodeJob((str(source),), str(output), restart=restart), lambda: encoder)
    assert pipe.is_fifo()
