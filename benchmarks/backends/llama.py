"""llama.cpp through llama-cpp-python: the same weights as GGUF, attention in both directions, its own mean pooling.

The architecture is llama.cpp's own "llama-embed": Llama without the output layer, which would cost a quarter more.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from backends import LONGEST, Job, Run

KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}
FILES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def load(job: Job) -> Run:
    """`Llama.embed` with as many texts at a time as fit the batch's tokens."""
    from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama  # pyright: ignore[reportMissingImports]

    file = job.scratch / f"{job.dtype}.gguf"
    if not file.is_file():
        write_gguf(job.folder, file, job.dtype)
    model = Llama(
        str(file),
        embedding=True,
        pooling_type=LLAMA_POOLING_TYPE_MEAN,
        n_ctx=job.setting.batch,
        n_batch=job.setting.batch,
        n_ubatch=job.setting.batch,  # attention in both directions needs all of a text in one
        n_threads=job.threads,
        n_threads_batch=job.threads,
        verbose=False,
    )

    def run(texts: Sequence[str]) -> np.ndarray:
        return np.array(model.embed(list(texts)), dtype=np.float32)

    return run


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """A hub folder of a Llama with a byte-level BPE tokenizer as GGUF.

    Raises:
        ValueError: the model is not of that kind.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"written for model_type llama, not {config.get('model_type')}")
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama-embed")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_file_type(FILES[dtype])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings", LONGEST))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_tokenizer(writer, folder, config["vocab_size"])
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            values = tensors.get_tensor(name).float().numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = interleaved(values, heads if "q_proj" in name else kv_heads)
            kind = KINDS[dtype] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp's rotation, which turns neighbours; the hub's turns halves."""
    rows, width = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _gguf_name(name: str) -> str:
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[unused{row}]" for row in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for token, row in said["model"]["vocab"].items():
        tokens[row], types[row] = token, gguf.TokenType.NORMAL
    for added in said["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in said["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
