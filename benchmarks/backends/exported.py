"""ONNX Runtime and OpenVINO: the transformers model exported once, with mean pooling in the graph.

The mask goes in as what is added to the scores, so that the export sees attention in both directions and none of the
code by which transformers decides on a mask.
"""

import os
from pathlib import Path

import numpy as np
import torch

from backends import Job, Run
from backends.padded import in_sorted_batches

NAMES = ("input_ids", "attention_mask")


class MeanPooled(torch.nn.Module):
    """Token ids and mask, int64 [n, t], to vectors, float32 [n, width]."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        real = attention_mask.float()
        count, length = input_ids.shape
        added = ((1.0 - real) * torch.finfo(torch.float32).min)[:, None, None, :].expand(count, 1, length, length)
        hidden = self.model(input_ids=input_ids, attention_mask=added, use_cache=False).last_hidden_state
        return (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to trace with: two sequences, one of them padded."""
    return torch.arange(14).reshape(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def onnx_file(job: Job) -> Path:
    """The model as ONNX, weights beside it because one file ends at 2 GB."""
    folder = job.scratch / "onnx"
    if not folder.is_dir():
        partial = job.scratch / f"onnx.{os.getpid()}"
        partial.mkdir()
        any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with torch.inference_mode():
            torch.onnx.export(
                MeanPooled(job.folder),
                example(),
                str(partial / "model.onnx"),
                input_names=NAMES,
                output_names=["vectors"],
                dynamic_shapes=(any_size, any_size),
                external_data=True,
            )
        partial.rename(folder)
    return folder / "model.onnx"


def onnxruntime_float32(job: Job) -> Run:
    return _onnxruntime(onnx_file(job), job)


def onnxruntime_int8(job: Job) -> Run:
    """Load ONNX Runtime's dynamic quantisation with its defaults: 8-bit weights, activations scaled per call."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

    folder = job.scratch / "onnx-int8"
    if not folder.is_dir():
        partial = job.scratch / f"onnx-int8.{os.getpid()}"
        partial.mkdir()
        # The quantiser looks for products with constants; the exporter leaves the weights' transposes as nodes.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(partial / "folded.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.data")
        onnxruntime.InferenceSession(str(onnx_file(job)), options, providers=["CPUExecutionProvider"])
        quantize_dynamic(
            partial / "folded.onnx",
            partial / "model.onnx",
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )
        partial.rename(folder)
    return _onnxruntime(folder / "model.onnx", job)


def _onnxruntime(file: Path, job: Job) -> Run:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, job.threads // job.setting.side_by_side)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def batch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, dict(zip(NAMES, (ids, mask), strict=True)))[0])

    return in_sorted_batches(batch, job)


def openvino(job: Job) -> Run:
    """Convert the torch module itself, with GEMMs in the precision of the run."""
    import openvino  # pyright: ignore[reportMissingImports]

    file = job.scratch / "openvino" / "model.xml"
    core = openvino.Core()
    if not file.is_file():
        any_size = openvino.PartialShape([-1, -1])
        with torch.inference_mode():
            model = openvino.convert_model(
                MeanPooled(job.folder),
                example_input=example(),
                input=[(any_size, openvino.Type.i64), (any_size, openvino.Type.i64)],
            )
        openvino.save_model(model, file, compress_to_fp16=False)
        del model
    streams = job.setting.side_by_side
    compiled = core.compile_model(
        file,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.dtype],
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": streams,
        },
    )
    requests = [compiled.create_infer_request() for _ in range(streams)]

    def batch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        request = requests.pop()  # as many as there are threads that call this
        try:
            return np.array(request.infer([ids, mask])[0])
        finally:
            requests.append(request)

    return in_sorted_batches(batch, job)
