"""infinity-emb as a provider: it is refused, because the library that it needs keeps a decoder's causal mask."""

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from package_folders import isolated_python, link_packages, python_packages

from tests.api.live import until
from tests.checkpoint.layouts import MEAN, Layout, llama3, write_layout
from tests.conftest import model_cache
from tests.router.test_sentence_transformers_peer import finding_of
from unmask.conformance import References, build_references
from unmask.server.http_server import listen

LONGEST = 300


@contextmanager
def infinity(model: Path, scratch: Path) -> Iterator[str]:
    """Run infinity-emb's server over a model folder. Yields its URL."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    packages = python_packages(Path(__file__).parent / "infinity.txt", model_cache())
    folders = [packages, link_packages(scratch / "packages", "torch")]
    command, environment = isolated_python(folders, "-c", "from infinity_emb.cli import cli; cli()", "v2")
    command += [
        "--model-id",
        str(model),
        "--served-model-name",
        "m",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--engine",
        "torch",
        "--device",
        "cpu",
    ]
    command += ["--dtype", "float32", "--batch-size", "8", "--no-bettertransformer", "--no-model-warmup"]
    environment |= {"HOME": str(scratch), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    log = scratch / "log"
    with log.open("wb") as opened, subprocess.Popen(command, env=environment, stdout=opened, stderr=opened) as process:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.TransportError:
                return False

        try:
            until(answers, 300)
            yield url
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in both directions with the mean of all tokens, in the layout of sentence-transformers."""
    config = {"model_type": "llama", "is_causal": False, "max_position_embeddings": 1024}
    pooling = {**MEAN, "include_prompt": True}
    layout = Layout(config, llama3, pooling, {}, lengths={"max_seq_length": LONGEST})
    place = tmp_path_factory.mktemp("infinity") / "model"
    return write_layout(place, layout, **{"tokenizer_config.json": {"model_max_length": 1024}})


def test_a_peer_that_keeps_the_causal_mask_is_refused_by_that_sentence(folder: Path, tmp_path: Path) -> None:
    references: References = build_references(str(folder), model="m", draw=random.Random(5))
    with infinity(folder, tmp_path) as url:
        finding = finding_of(url, references)
    assert (finding.passed, finding.fault) == (False, "keeps the causal mask")
