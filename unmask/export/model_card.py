"""The model card of an export: front matter of the hub, usage per runtime, what is exact, and the parity table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from unmask import __version__
from unmask.encoder.head import head_steps
from unmask.export.capabilities import ExportedModel, ExportVerdict, Target, head_fits_a_layer
from unmask.export.hub import default_prompt_name, lengths_of, prompts_of, sequence_tokens, vector_size
from unmask.export.parity import ParityReport, ParityRow

_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "dense", "llm2vec", "unmask")
_LIBRARIES: dict[Target, str] = {"hub": "sentence-transformers", "onnx": "onnx", "gguf": "gguf"}


@dataclass(frozen=True)
class CardFacts:
    """Facts about a model that its files do not hold.

    Attributes:
        name: of the model, for the title.
        licence: as the hub spells it; "" if not known.
        languages: two-letter codes.
    """

    name: str
    licence: str = ""
    languages: Sequence[str] = ()


def model_card(
    model: ExportedModel,
    verdict: ExportVerdict,
    dtype: str,
    facts: CardFacts,
    report: ParityReport | None,
    file: str = "",
) -> str:
    """Write README.md.

    Args:
        report: of the files that were written; None if they were not checked.
        file: name of the GGUF file.
    """
    parts = [
        _front_matter(model, verdict.target, facts),
        f"# {facts.name}",
        _summary(model, dtype),
        "## Usage",
        *_usage(model, verdict.target, facts.name, dtype, file),
        "## What these files can express",
        "\n".join(f"- {sentence.strip()}" for sentence in verdict.sentences()),
        "## Parity",
        parity_markdown(report) if report is not None else "Not checked: run `unmask parity MODEL FOLDER`.",
    ]
    return "\n\n".join(parts) + "\n"


def parity_markdown(report: ParityReport) -> str:
    """Write a report as a table, with its notes."""
    lines = [
        f"Cosine to unmask {__version__} in float32; `unmask parity MODEL FOLDER` measures it again.",
        "",
        "| runtime | precision | texts | batching | number | mean | worst | largest difference | gate (mean, worst) |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_markdown_row(row) for row in report.rows),
    ]
    return "\n".join([*lines, *(f"\n{note}." for note in report.notes)])


def _markdown_row(row: ParityRow) -> str:
    gate = "not judged" if row.gate is None else f"{row.gate[0]}, {row.gate[1]}"
    cells = (
        row.runtime,
        row.dtype,
        row.use,
        row.batching,
        str(row.count),
        f"{row.mean:.7f}",
        f"{row.worst:.7f}",
        f"{row.difference:.1e}",
        gate,
    )
    return f"| {' | '.join(cells)} |"


def _front_matter(model: ExportedModel, target: Target, facts: CardFacts) -> str:
    lines = [f"library_name: {_LIBRARIES[target]}"]
    lines += ["pipeline_tag: sentence-similarity" if target == "hub" else "pipeline_tag: feature-extraction"]
    if facts.licence:
        lines.append(f"license: {facts.licence.lower()}")
    if facts.languages:
        lines += ["language:", *(f"- {language}" for language in facts.languages)]
    base = model.checkpoint.trained_as
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        relation = "finetune" if target == "hub" else "quantized"
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    lines += ["tags:", *(f"- {tag}" for tag in (*_TAGS, *({"onnx": ("onnx", "transformers.js")}.get(target, ()))))]
    return "\n".join(["---", *lines, "---"])


def _summary(model: ExportedModel, dtype: str) -> str:
    config = model.checkpoint.config
    mask = "the causal mask on" if model.causal else "attention in both directions"
    facts = [
        f"{config.get('num_hidden_layers')} layers of {config.get('model_type')} with {mask}",
        f"pooling `{model.pooling}`",
        f"vectors of {vector_size(model)} numbers, scaled to length 1",
        f"at most {model.max_length} tokens",
        f"weights in {dtype}",
    ]
    if lengths := lengths_of(model):
        facts.append(f"vectors may be cut to {', '.join(map(str, lengths))} numbers and scaled again")
    prompts = {name: prompt for name, prompt in prompts_of(model).items() if prompt}
    lines = [f"Written by unmask {__version__}: {'; '.join(facts)}."]
    if prompts:
        table = [f"| `{name}` | `{json.dumps(prompt, ensure_ascii=False)}` |" for name, prompt in prompts.items()]
        lines += ["", "| prompt | text before a text |", "|---|---|", *table]
    return "\n".join(lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _usage(model: ExportedModel, target: Target, name: str, dtype: str, file: str) -> list[str]:
    return {"hub": _hub_usage, "onnx": _onnx_usage, "gguf": _gguf_usage}[target](model, name, dtype, file)


def _hub_usage(model: ExportedModel, name: str, dtype: str, file: str) -> list[str]:
    has_query = bool(model.instructions["query"])
    calls = 'queries = model.encode_query(["a question"])\n' if has_query else ""
    texts = "encode_document" if has_query or default_prompt_name(model) else "encode"
    family = str(model.checkpoint.config.get("model_type"))
    parts = [
        "**sentence-transformers** (with transformers 5.2 or newer; older versions keep the causal mask)",
        _code(
            "python",
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("path/to/{name}")\n{calls}vectors = model.{texts}(["a text"])',
        ),
        "With FlashAttention 2, set `model[0].unpad_inputs = False`.",
        "**unmask**",
        _code("python", f'from unmask import Encoder\n\nvectors = Encoder.load("path/to/{name}").encode(["a text"])'),
        "**vLLM** (without `--dtype`, it rounds float32 weights to 16 bits)",
        _code("sh", f"vllm serve path/to/{name} --runner pooling --dtype {dtype}{_vllm_flags(family)}"),
        _pools_everything(model, "vLLM"),
        "**Text Embeddings Inference** (GPU images)",
        _code("sh", f"text-embeddings-router --model-id path/to/{name}"),
        _pools_everything(model, "Text Embeddings Inference"),
    ]
    return [part for part in parts if part]


def _vllm_flags(family: str) -> str:
    """Gemma 1 and 2 are causal in vLLM's own code (0.32), and right in its transformers backend."""
    return " --model-impl transformers" if family in ("gemma", "gemma2") else ""


def _pools_everything(model: ExportedModel, runtime: str) -> str:
    skipped = [
        *(["BOS"] if model.parts.bos and not model.is_plain else []),
        *(["the instruction"] if any(model.instructions.values()) and model.prompts.skip_instruction else []),
    ]
    if not skipped or not model.is_mean:
        return ""
    return f"{runtime} pools {' and '.join(skipped)} too, so its vectors are not the model's. The ONNX export is exact."


def _onnx_usage(model: ExportedModel, name: str, dtype: str, file: str) -> list[str]:
    return [
        "The graph pools and scales by itself: take the output `sentence_embedding`. BOS, instruction and template are "
        "kept out of the mean inside the graph. Put a prompt before a text as a string.",
        "**ONNX Runtime**",
        _code(
            "python",
            "import numpy as np\nimport onnxruntime\nfrom tokenizers import Tokenizer\n\n"
            f'tokenizer = Tokenizer.from_file("{name}/tokenizer.json")\n'
            "tokenizer.encode_special_tokens = True\n"
            f"tokenizer.enable_truncation({model.max_length})\ntokenizer.enable_padding()\n"
            f'session = onnxruntime.InferenceSession("{name}/{file}")\n'
            'rows = tokenizer.encode_batch(["a text", "another text"])\n'
            'feed = {\n    "input_ids": np.array([row.ids for row in rows]),\n'
            '    "attention_mask": np.array([row.attention_mask for row in rows]),\n}\n'
            'vectors = session.run(["sentence_embedding"], feed)[0]',
        ),
        "**fastembed**",
        _code(
            "python",
            "from fastembed import TextEmbedding\n"
            "from fastembed.common.model_description import ModelSource, PoolingType\n\n"
            "TextEmbedding.add_custom_model(\n"
            f'    model="local/{name}",\n    pooling=PoolingType.DISABLED,\n    normalization=False,\n'
            f'    sources=ModelSource(url="local"),\n    dim={vector_size(model)},\n    model_file="{file}",\n'
            '    output_name="sentence_embedding",\n)\n'
            f'model = TextEmbedding("local/{name}", specific_model_path="path/to/{name}")\n'
            'vectors = list(model.embed(["a text"]))',
        ),
        "**transformers.js**",
        _transformers_js(model, name, dtype),
        *_lost_tail(model),
        *_cpu_text_embeddings_inference(name, dtype),
    ]


def _cpu_text_embeddings_inference(name: str, dtype: str) -> list[str]:
    """It asks for a pooling where the folder states none, and then takes `sentence_embedding` as it is."""
    if dtype != "float32":
        return []  # it opens onnx/model.onnx alone
    return [
        "**Text Embeddings Inference** (CPU images; `--pooling` has to be there, and is not used)",
        _code("sh", f"text-embeddings-router --model-id path/to/{name} --pooling mean"),
    ]


def _transformers_js(model: ExportedModel, name: str, dtype: str) -> str:
    """The pipeline averages the token output, so it knows neither other poolings nor layers behind them, nor a cut."""
    if model.pooling != "mean" or vector_size(model) != model.checkpoint.config["hidden_size"] or _has_head(model):
        return "The pipeline pools by itself and has other vectors: call the model, and take `sentence_embedding`."
    option = {"float32": "fp32", "float16": "fp16"}.get(dtype, dtype)
    return _code(
        "js",
        'import { env, pipeline } from "@huggingface/transformers";\n\n'
        'env.localModelPath = "path/to/";\n'
        f'const extract = await pipeline("feature-extraction", "{name}", {{ dtype: "{option}" }});\n'
        'const vectors = await extract(["a text"], { pooling: "mean", normalize: true });',
    )


def _lost_tail(model: ExportedModel) -> list[str]:
    """Return the warning for a model with tokens behind the text: transformers.js adds them before it truncates."""
    if not sequence_tokens(model)[1]:
        return []
    return [
        f"transformers.js cuts an input of more than {model.max_length} tokens at its end, and so drops the tokens "
        "that belong behind the text. The vector is then another one: shorten such texts first."
    ]


def _has_head(model: ExportedModel) -> bool:
    steps = head_steps(model.checkpoint.tensors, model.checkpoint.encoder_config)
    return any(step.get("kind") != "normalize" for step in steps)


def _gguf_usage(model: ExportedModel, name: str, dtype: str, file: str) -> list[str]:
    return [
        "**llama.cpp**: pooling, mask and length are in the file. `-ub` bounds the length of a text.",
        _code("sh", f"llama-server -m {file} --embedding -ub {model.max_length}"),
        "**Ollama**, in this folder",
        _code("sh", f"ollama create {name} -f Modelfile"),
        'LM Studio takes this for a chat model: set "Override Domain Type" to "Text Embedding".',
        *_head_layer(model, dtype),
    ]


def _head_layer(model: ExportedModel, dtype: str) -> list[str]:
    """Return the warning for a file whose last layer is the head, which float16 cannot hold."""
    if not head_fits_a_layer(model) or dtype == "q8":
        return []
    return [
        "The last layer of this file is the linear layer behind the pooling, with a factor that float16 cannot hold: "
        "do not quantise the file again, but export it with `--dtype q8`."
    ]
