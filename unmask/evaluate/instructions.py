"""The instruction of each task, for models that read one."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

Side = Literal["queries", "documents"]

# The published scores of these models were measured with the instructions of mteb's table.
REFERENCE_FAMILY = "McGill-NLP/LLM2Vec-"


def instruction_for(task: str, category: str, side: Side, mteb_prompt: str, *, model: str = "") -> str:
    """Return the instruction for one side of a task; "" for none.

    As in LLM2Vec (arXiv 2404.05961, appendix on instructions): queries and both sides of symmetric tasks get one,
    documents are bare, and every instruction ends in ":".

    Args:
        task: mteb's name of the task.
        category: mteb's type of the task; only for "Retrieval" do the sides differ.
        side: "documents" is the corpus of a retrieval or reranking task.
        mteb_prompt: instruction from mteb's own table, for tasks that are not in ours.
        model: name of the model; the published LLM2Vec models keep the instructions of their publication.
    """
    ours = _table().get(task, {})
    if side == "documents" and (category == "Retrieval" or "documents" in ours):
        return ours.get("documents", "")
    if "queries" in ours and not model.startswith(REFERENCE_FAMILY):
        return ours["queries"]
    prompt = mteb_prompt.strip().rstrip(".")
    return prompt if not prompt or prompt.endswith(":") else prompt + ":"


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads((files("unmask.evaluate") / "instructions.toml").read_text(encoding="utf-8"))
