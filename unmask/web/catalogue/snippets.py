"""Example calls to copy: curl, Python, JavaScript and LangChain, with this server's address and the model's id."""

import json
import shlex
from dataclasses import dataclass

from unmask.catalogue import Record


@dataclass(frozen=True)
class Snippet:
    """An example call. `key` is its id in the page."""

    key: str
    title: str
    code: str


def snippets(record: Record, base: str, *, secured: bool) -> list[Snippet]:
    """Return example calls of one model.

    Args:
        record: the model's record.
        base: address of the server.
        secured: the server asks for an API key.
    """
    model, address = json.dumps(record.id), json.dumps(f"{base}/v1")
    instructed = bool(record.query_instruction)
    return [
        Snippet("curl", "curl", _curl(record, base, secured=secured)),
        Snippet("python", "Python", _python(model, address, instructed=instructed, secured=secured)),
        Snippet("javascript", "JavaScript", _javascript(model, address, instructed=instructed, secured=secured)),
        Snippet("langchain", "LangChain", _langchain(model, address, instructed=instructed, secured=secured)),
    ]


def export_snippet(record: Record) -> Snippet:
    """Return the commands that write a model for other runtimes, and compare its vectors there."""
    folder = shlex.quote(record.id.rpartition("/")[2])
    model = shlex.quote(record.id)
    lines = [
        "# sentence-transformers, vLLM, TEI; or --to onnx, --to gguf",
        f"unmask export {model} --to hub --output {folder}",
        "# compares texts, documents and queries, and names what differs",
        f"unmask parity {model} {folder}",
    ]
    return Snippet("export", "Other runtimes", "\n".join(lines))


def _curl(record: Record, base: str, *, secured: bool) -> str:
    body = {"model": record.id, "input": ["a first text", "a second text"]}
    lines = [f"curl {base}/v1/embeddings"]
    if secured:
        lines.append('-H "Authorization: Bearer $UNMASK_API_KEY"')
    lines.append("-H 'Content-Type: application/json'")
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    lines.append(f"-d '{quoted}'")
    return " \\\n  ".join(lines)


def _python(model: str, address: str, *, instructed: bool, secured: bool) -> str:
    key = 'os.environ["UNMASK_API_KEY"]' if secured else '"unused"'
    lines = ["import os", ""] if secured else []
    lines += [
        "from openai import OpenAI",
        "",
        f"client = OpenAI(base_url={address}, api_key={key})",
        f'reply = client.embeddings.create(model={model}, input=["a first text", "a second text"])',
        "vectors = [item.embedding for item in reply.data]",
    ]
    if instructed:
        lines += [
            "",
            "# The model reads an instruction with queries, and none with documents.",
            "query = client.embeddings.create(",
            f'    model={model}, input="what is a first text?", extra_body={{"input_type": "query"}}',
            ")",
        ]
    return "\n".join(lines)


def _javascript(model: str, address: str, *, instructed: bool, secured: bool) -> str:
    key = "process.env.UNMASK_API_KEY" if secured else '"unused"'
    lines = [
        'import OpenAI from "openai";',
        "",
        f"const client = new OpenAI({{ baseURL: {address}, apiKey: {key} }});",
        "const reply = await client.embeddings.create({",
        f"  model: {model},",
        '  input: ["a first text", "a second text"],',
        "});",
        "const vectors = reply.data.map((item) => item.embedding);",
    ]
    if instructed:
        lines += [
            "",
            "// Queries carry an instruction: add the field input_type.",
            "const query = await client.embeddings.create({",
            f'  model: {model}, input: "what is a first text?", input_type: "query",',
            "});",
        ]
    return "\n".join(lines)


def _langchain(model: str, address: str, *, instructed: bool, secured: bool) -> str:
    key = 'os.environ["UNMASK_API_KEY"]' if secured else '"unused"'
    lines = ["import os", ""] if secured else []
    lines += [
        "from langchain_openai import OpenAIEmbeddings",
        "",
        "embeddings = OpenAIEmbeddings(",
        f"    model={model},",
        f"    base_url={address},",
        f"    api_key={key},",
        "    check_embedding_ctx_length=False,  # send texts, not OpenAI's token ids",
        ")",
        'vectors = embeddings.embed_documents(["a first text", "a second text"])',
    ]
    if instructed:
        lines += [
            "",
            "# For queries, a second object with the model's own instruction.",
            "queries = OpenAIEmbeddings(",
            f"    model={model}, base_url={address}, api_key={key},",
            '    check_embedding_ctx_length=False, model_kwargs={"extra_body": {"input_type": "query"}},',
            ")",
        ]
    return "\n".join(lines)
