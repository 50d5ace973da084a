"""Models without weights on this machine: tokenizer and references are here, and providers alone answer."""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.live import LocalService, running, until
from tests.router.fault_server import FaultServer, fault_server_thread, right
from tests.router.test_providers import MODEL, SLOW, TEXTS, Upstreams, customer, providers_file
from tests.web.conftest import HTML
from tests.web.people import Visitor, person
from unmask.accounts.keys import KeySettings
from unmask.catalogue.store import open_database
from unmask.checkpoint import open_checkpoint
from unmask.conformance import read_references
from unmask.encoder import Encoder, LoadOptions
from unmask.encoder.loading import open_prompts
from unmask.errors import CheckpointError, UsageError
from unmask.router.providers import read_providers
from unmask.web import website

QUERY = "Find the boat: "


def catalogue_url(folder: Path) -> str:
    """The address of a database with a catalogue, in a folder."""
    url = f"sqlite:///{folder / 'c.sqlite'}"
    open_database(url).close()
    return url


@pytest.fixture(scope="module")
def bare(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder without its weights, and with an instruction for queries."""
    folder = tmp_path_factory.mktemp("bare") / MODEL
    shutil.copytree(tiny_llama, folder, ignore=lambda _, names: {name for name in names if "model.safe" in name})
    (folder / "llm2vec_config.json").write_text(json.dumps({"query_instruction": QUERY}))
    return folder


@pytest.fixture
def references(tiny_llama: Path, tmp_path: Path, unmask) -> Path:
    """The right vectors, as the machine with the weights writes them."""
    file = tmp_path / "right.npz"
    options = ["--weights", str(tiny_llama), "--database", catalogue_url(tmp_path)]
    done = unmask("providers", "references", MODEL, "--output", str(file), *options)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o077 == 0
    return file


@pytest.fixture
def upstream(encoder: Encoder) -> Iterator[FaultServer]:
    lock = threading.Lock()

    def embed(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    with fault_server_thread(embed) as server:
        yield server


def with_references(file: Path, references: Path, model: str = MODEL) -> Path:
    file.write_text(f'{file.read_text()}\n[references]\n"{model}" = "{references}"\n')
    return file


def admitted(service: LocalService) -> Callable[[], bool]:
    pool = service.models.providers
    assert pool is not None
    return lambda: pool.models()[MODEL].any_admitted()


def test_providers_answer_for_a_model_without_weights(
    bare: Path, references: Path, upstream: FaultServer, tiny_llama: Path, encoder: Encoder, tmp_path: Path
) -> None:
    file = with_references(providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url), references)
    with running(bare, build_pages=website, providers_file=file, intervals=SLOW, warm=(), api_keys=()) as service:
        until(admitted(service))
        got = service.embed(TEXTS)
        assert got.status == 200, got.body
        np.testing.assert_allclose(got.vectors, encoder.encode(TEXTS, normalize=True), atol=1e-6)
        assert got.json["usage"]["prompt_tokens"] == encoder.count_tokens(TEXTS).sum()
        assert (got.headers["x-unmask-provider"], service.models.list()[0].state) == ("b", "remote")
        space = got.headers["x-unmask-vector-space"]

        listed = service.call("GET", f"/v1/models/{MODEL}").json
        facts = {name: listed[name] for name in ("status", "dimensions", "max_tokens", "pooling", "vector_space")}
        assert facts == {
            "status": "remote", "dimensions": encoder.dim, "max_tokens": encoder.max_length, "pooling": "mean",
            "vector_space": space,
        }  # fmt: skip
        assert listed["revision"] == open_checkpoint(tiny_llama).revision
        endpoints = service.call("GET", f"/v1/models/{MODEL}/endpoints").json
        assert [one["name"] for one in endpoints["data"]] == ["a", "b"] and endpoints["vector_space"] == space
        assert service.call("GET", "/ready").json["models"] == {MODEL: "ok"}
        assert service.call("GET", "/info").json["max_input_length"] == encoder.max_length

        page = service.call("GET", f"/models/{MODEL}", headers=HTML).body.decode()
        assert "Its providers answer; this server never loads it." in page and "first request" not in page
        assert "answered by providers" in service.call("GET", "/status", headers=HTML).body.decode()
        form = {"content-type": "application/x-www-form-urlencoded"}
        tried = service.call("POST", "/playground", b"texts=a+ferry%0D%0Abread+rises&query=boat", form | HTML)
        assert tried.status == 200 and b"nearest" in tried.body.lower()

        tokens = service.call("POST", "/tokenize", {"inputs": "a ferry leaves"}).json
        assert [token["id"] for token in tokens[0]] == list(encoder.prompts.build(["a ferry leaves"])[0].ids)
        for body in ({"normalize": False}, {"input": [[1, 2, 3]], "token_encoding": "native"}):
            refused = service.call("POST", "/v1/embeddings", {"model": MODEL, "input": "a ferry"} | body)
            assert (refused.status, refused.error["code"]) == (503, "no_conforming_provider")
        assert not [name for name in bare.iterdir() if name.suffix == ".safetensors"]

    with running(tiny_llama, api_keys=()) as whole:
        assert whole.embed("a ferry").headers.get("x-unmask-vector-space") in (space, None)
        assert whole.call("GET", f"/v1/models/{MODEL}").json["vector_space"] == space


def test_the_files_say_which_instruction_providers_are_given(
    bare: Path, references: Path, upstream: FaultServer, encoder: Encoder, tmp_path: Path
) -> None:
    file = with_references(providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url), references)
    with running(bare, providers_file=file, intervals=SLOW, warm=(), api_keys=()) as service:
        until(admitted(service))
        got = service.embed("a ferry leaves", input_type="query")
        expected = encoder.encode("a ferry leaves", instruction=QUERY, normalize=True)
        np.testing.assert_allclose(got.vectors, expected, atol=1e-6)


def test_a_cold_model_gives_providers_the_instruction_of_its_files(
    tiny_llama: Path, upstream: FaultServer, encoder: Encoder, tmp_path: Path
) -> None:
    """Before the weights are loaded, nobody but the files knows the instruction for queries."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / MODEL))
    (folder / "llm2vec_config.json").write_text(json.dumps({"query_instruction": QUERY}))
    file = providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url, remote_only=False)
    with running(folder, providers_file=file, intervals=SLOW, warm=(), api_keys=()) as service:
        until(admitted(service))
        assert service.models.list()[0].state == "cold"
        got = service.embed("a ferry leaves", input_type="query")
        assert got.headers["x-unmask-provider"] == "b"
        expected = encoder.encode("a ferry leaves", instruction=QUERY, normalize=True)
        np.testing.assert_allclose(got.vectors, expected, atol=1e-6)
        until(lambda: service.models.list()[0].state == "ready")


def test_without_references_nobody_is_admitted_and_the_operator_reads_why(
    bare: Path, upstream: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, unmask
) -> None:
    file = providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url)
    url, accounts, _, key = customer(tmp_path, KeySettings())
    options: dict[str, Any] = {"api_keys": (), "accounts_url": url, "providers_file": file, "warm": ()}
    with caplog.at_level(logging.ERROR), running(bare, accounts, website, intervals=SLOW, **options) as service:
        pool = service.models.providers
        assert pool is not None
        until(lambda: bool(pool.models()[MODEL].problem))
        got = service.call("POST", "/v1/embeddings", {"model": MODEL, "input": "a ferry"}, key=key)
        assert (got.status, got.error["code"]) == (503, "no_conforming_provider")
        assert got.headers["retry-after"] == "120" and str(bare) not in got.body.decode()
        assert service.call("GET", "/ready", key=key).status == 503
        problem = pool.models()[MODEL].problem
        admin = Visitor.signed_in(service, accounts, person(accounts, "admin@example.org", admin=True))
        assert "No provider can be checked, so none is used." in admin.get("/admin/providers").body.decode()
    accounts.close()
    assert "holds no weights" in problem and f"unmask providers references {MODEL} --output FILE" in problem
    assert problem in caplog.text and not upstream.requests
    database = ["--database", catalogue_url(tmp_path)]
    checked = unmask("providers", "check", "--providers", str(file), "--weights", str(bare), *database)
    assert checked.returncode == 1 and "[references]" in checked.stderr


def test_references_of_another_model_are_refused(
    bare: Path, references: Path, upstream: FaultServer, tmp_path: Path
) -> None:
    """The counts of another tokenizer would be charged, and the providers' vectors be of something else."""
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    for name, content, problem in (
        ("tokenizer.json", tokenizer, r"count \d+ tokens for a canary text, and its files here \d+"),
        ("llm2vec_config.json", {"max_length": 100}, "have max_tokens 512, its files here 100"),
        ("llm2vec_config.json", {"pooling_mode": "last_token"}, "have pooling mean, its files here last_token"),
    ):
        other = Path(shutil.copytree(bare, tmp_path / name / MODEL, dirs_exist_ok=True))
        (other / name).write_text(json.dumps(content))
        file = with_references(providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url), references)
        with running(other, providers_file=file, intervals=SLOW, warm=(), api_keys=()) as service:
            pool = service.models.providers
            assert pool is not None
            until(lambda pool=pool: bool(pool.models()[MODEL].problem))
            assert re.search(problem, pool.models()[MODEL].problem)
            assert service.embed("a ferry").status == 503 and not upstream.requests


def test_new_references_take_all_providers_out_until_they_are_checked(
    bare: Path, references: Path, upstream: FaultServer, tmp_path: Path
) -> None:
    file = with_references(providers_file(tmp_path, "http://127.0.0.1:1/v1", upstream.url), references)
    with running(bare, providers_file=file, intervals=SLOW, warm=(), api_keys=()) as service:
        upstreams = Upstreams(upstream, upstream, service)
        until(admitted(service))
        before = upstreams.endpoint("b")
        upstreams.in_loop(upstreams.pool.reload)
        until(lambda: upstreams.endpoint("b") is not before)
        assert upstreams.endpoint("b").admission == "admitted"  # the same file
        renewed = tmp_path / "newer.npz"
        shutil.copy(references, renewed)
        renewed.chmod(0o600)
        file.write_text(file.read_text().replace(str(references), str(renewed)))
        number, upstream.script[:] = len(upstream.requests), [right]
        upstreams.in_loop(upstreams.pool.reload)
        until(lambda: len(upstream.requests) > number + 3)  # a full run
        until(admitted(service))


def test_the_file_of_providers_names_references_that_can_be_used(references: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/v1"
    good = with_references(providers_file(tmp_path, url, url), references).read_text()
    file = tmp_path / "providers.toml"
    assert read_providers(file).references_file(MODEL) == references
    (tmp_path / "none.npz").write_bytes(b"not a zip")
    (tmp_path / "none.npz").chmod(0o600)
    for text, message in (
        (good.replace(f'remote_only = ["{MODEL}"]', ""), "not in remote_only"),
        (good.replace("right.npz", "no.npz"), "No such file"),
        (good.replace("right.npz", "none.npz"), "holds no references"),
        (good.replace(MODEL, "another"), f"is for {MODEL}"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=r'references\."\w+": .*' + re.escape(message)):
            read_providers(file)
    file.write_text(good)
    references.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        read_providers(file)


def test_check_takes_the_references_of_the_file(
    bare: Path, references: Path, upstream: FaultServer, tmp_path: Path, unmask
) -> None:
    file = with_references(providers_file(tmp_path, upstream.url, upstream.url), references)
    database = ["--database", catalogue_url(tmp_path)]
    checked = unmask("providers", "check", "b", "--providers", str(file), *database, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout[checked.stdout.index("[\n") :])[0]["finding"]["precision"] == "exact"


def test_a_checkpoint_without_weights_has_all_but_them(bare: Path, tiny_llama: Path, references: Path) -> None:
    whole, without = open_checkpoint(tiny_llama), open_checkpoint(bare, weights=False)
    assert without.tokenizer.highest_id == whole.tokenizer.highest_id and without.config == whole.config
    assert read_references(references).revision == whole.revision
    with pytest.raises(CheckpointError, match="without its weights"):
        _ = without.revision
    for read in (without.tensors.names, lambda: without.tensors.shape("x"), lambda: without.tensors.read("x")):
        with pytest.raises(CheckpointError, match="without its weights"):
            read()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(bare)


def test_every_published_layout_has_its_text_handling_without_weights(published, tmp_path: Path) -> None:
    from tests.checkpoint.layouts import LAYOUTS

    for name in LAYOUTS:
        whole = published(name)
        weights = {path.name for path in whole.rglob("*") if path.suffix in (".safetensors", ".bin")}
        copy = tmp_path / name
        shutil.copytree(whole, copy, ignore=lambda _, names, weights=weights: weights & {*names})
        options = LoadOptions()
        ours, theirs = open_prompts(copy, options), Encoder.load(whole, dtype="float32").prompts
        for text in ("a ferry leaves", "ß Üb 日本", "</s> [CLS]"):
            first, second = ours.build([text], "Find:")[0], theirs.build([text], "Find:")[0]
            assert (first.ids.tolist(), first.pooled) == (second.ids.tolist(), second.pooled)
