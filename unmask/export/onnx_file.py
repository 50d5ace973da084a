"""ONNX folders for ONNX Runtime, fastembed, transformers.js and TEI's CPU image: graph, config, tokenizer, prompts."""

from dataclasses import replace
from pathlib import Path

import torch

from unmask import __version__
from unmask.disk import atomic_folder
from unmask.export.capabilities import ExportedModel
from unmask.export.hub import default_prompt_name, lengths_of, prompts_of, write_prompted_tokenizer
from unmask.export.onnx_graph import build_graph
from unmask.export.onnx_weights import WeightStore
from unmask.export.onnx_writer import write_onnx
from unmask.training.model_folder import EncoderSettings, write_json, written_config

# Names that transformers.js chooses by its option `dtype`.
_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "q8": "model_quantized.onnx"}


def write_onnx_folder(folder: Path, model: ExportedModel, dtype: str) -> str:
    """Write `onnx/model.onnx` with what a caller needs beside it, one tensor in memory at a time.

    Returns:
        Path of the graph in the folder.

    Raises:
        StorageError: the folder cannot be written; nothing is left of it then.
    """
    settings = replace(
        EncoderSettings.from_checkpoint(model.checkpoint), causal=model.causal, max_length=model.max_length
    )
    builder, graph = build_graph(model, WeightStore(model.checkpoint.tensors, dtype))
    with atomic_folder(folder) as partial:
        (partial / "onnx").mkdir()
        file = partial / "onnx" / _FILES[dtype]
        write_onnx(file, builder, graph, {"dtype": dtype, "producer": f"unmask {__version__}"})
        config = written_config(model.checkpoint, settings, torch.float32)
        if lengths := lengths_of(model):
            config["matryoshka_dimensions"] = lengths
        write_json(partial / "config.json", config)
        write_prompted_tokenizer(partial, model)
        prompts = {"prompts": prompts_of(model), "default_prompt_name": default_prompt_name(model)}
        write_json(partial / "config_sentence_transformers.json", prompts)
    return f"onnx/{_FILES[dtype]}"
