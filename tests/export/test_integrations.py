"""The snippets of docs/integrations.md that are marked as tested, run as they stand there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.live import KEY, running
from tests.export.tiny import FEW
from unmask import Encoder
from unmask.export import ExportOptions, run_export, run_parity

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SETTINGS = {"query_instruction": "Find what answers:", "document_instruction": "A passage:", "max_length": 128}


def snippets() -> dict[str, str]:
    """Python blocks below the headings that end in "(tested)"."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    blocks: dict[str, str] = {}
    for section in sections:
        title = section.partition("\n")[0]
        block = re.search(r"```python\n(.+?)```", section, flags=re.S)
        if title.endswith("(tested)") and block:
            blocks[title.removesuffix(" (tested)")] = block[1]
    return blocks


@pytest.fixture(scope="module")
def model(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-embed"
    shutil.copytree(golden_dir / "tiny_llama", folder)
    (folder / "llm2vec_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_the_page_has_a_snippet_for_every_framework() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("LangChain", "LlamaIndex", "Haystack", "Chroma", "LanceDB", "Qdrant", "pgvector", "txtai", "MTEB"):
        assert re.search(rf"^## {name}.*?\n```(python|js)\n", page, flags=re.M | re.S), name
    assert set(snippets()) == {"OpenAI's client", "LangChain", "sentence-transformers", "MTEB"}


def test_tested_snippets_give_the_models_vectors(model: Path) -> None:
    folder = model.with_name("exported")
    run_export(ExportOptions(model=str(model), target="hub", output=folder, check=False), lambda line: None)
    encoder = Encoder.load(model, dtype="float32")
    expected = np.concatenate(
        [encoder.encode_document(["a passage"], normalize=True), encoder.encode_query(["a question"], normalize=True)]
    )
    with running(model) as service:
        service.embed(["a text"])  # loads the model, whose files say its instructions
        values = {"URL": f"{service.url}/v1", "KEY": KEY, "NAME": service.model, "FOLDER": str(folder)}
        for name, code in snippets().items():
            variables: dict[str, Any] = dict(values)
            exec(compile(code, f"{PAGE.name}: {name}", "exec"), variables)
            np.testing.assert_allclose(np.array(variables["vectors"]), expected, atol=1e-5, err_msg=name)


def test_parity_asks_an_endpoint_for_queries_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with running(model) as service:
        service.embed(["a text"])
        report = run_parity(str(model), f"{service.url}/v1", model_name=service.model, texts=FEW)
        assert report.passed, report.faults
        assert {row.use for row in report.rows} == {"texts", "documents", "queries"}
        other = run_parity(str(model), f"{service.url}/v1", model_name=f"{service.model}:query", texts=FEW)
        assert not other.passed and other.notes
