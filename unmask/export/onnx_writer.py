"""Writing of ONNX models, tensor by tensor: a graph's nodes in memory, its weights one at a time.

The `onnx` package builds a whole model in memory and serialises it in one piece. A serialised message may be put
together from parts (https://protobuf.dev/programming-guides/encoding/), so the weights are appended to the graph here
as they are read. Above 2 GB, where a message must end, they go into a file beside it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
_IR_VERSION = 9  # read by ONNX Runtime since 1.16
_MAX_MESSAGE = 2_000_000_000
_ALIGNMENT = 4096
# Field numbers of onnx.proto with the wire type "length-delimited".
_GRAPH_OF_MODEL = bytes([7 << 3 | 2])
_INITIALIZER_OF_GRAPH = bytes([5 << 3 | 2])
_RAW_DATA_OF_TENSOR = bytes([9 << 3 | 2])
_SIZES: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.UINT8: 1}


@dataclass(frozen=True)
class StoredWeight:
    """A large tensor of a graph.

    Attributes:
        kind: TensorProto.FLOAT, FLOAT16 or UINT8.
        load: reads it, in that type and shape.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * _SIZES[self.kind]


class GraphBuilder:
    """Nodes of a graph in the order of computation, with names made for their outputs."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[StoredWeight] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._small: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the name of that output."""
        name = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def halves(self, value: str) -> tuple[str, str]:
        """Split a value in two along its last axis."""
        names = [f"Split_{len(self.nodes)}_{part}" for part in "ab"]
        self.nodes.append(helper.make_node("Split", [value], names, name=names[0], axis=-1, num_outputs=2))
        return names[0], names[1]

    def constant(self, value: np.ndarray) -> str:
        """Add a small tensor; an equal one is there once."""
        value = np.ascontiguousarray(value)
        key = (str(value.dtype), value.tobytes(), value.shape)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._small.append(numpy_helper.from_array(value, name))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """Add a list of int64, as shapes and axes are."""
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """Add a float32 without axes."""
        return self.constant(np.array(value, dtype=np.float32))

    def weight(self, weight: StoredWeight) -> str:
        """Add a tensor that is written when its turn comes."""
        self.weights.append(weight)
        return weight.name

    def graph(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.GraphProto:
        """Make the graph without its weights."""
        return helper.make_graph(self.nodes, "encoder", inputs, outputs, initializer=self._small)


def write_onnx(file: Path, builder: GraphBuilder, graph: onnx.GraphProto, metadata: dict[str, str]) -> None:
    """Write a model, one weight in memory at a time; above 2 GB its weights go to `NAME.onnx.data`.

    Raises:
        OSError: it cannot be written.
    """
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="unmask", opset_import=opsets)
    helper.set_model_props(model, metadata)
    head, nodes = model.SerializeToString(), graph.SerializeToString()
    is_external = len(nodes) + sum(weight.size for weight in builder.weights) > _MAX_MESSAGE
    place = f"{file.name}.data" if is_external else ""
    entries, offset = [], 0
    for weight in builder.weights:
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        entries.append(_entry(weight, place, offset))
        offset += weight.size
    inline = [0 if is_external else weight.size for weight in builder.weights]
    sizes = [_message_size(entry, size) for entry, size in zip(entries, inline, strict=True)]
    with file.open("wb") as out:
        out.write(head)
        total = len(nodes) + sum(1 + len(_varint(size)) + size for size in sizes)
        out.write(_GRAPH_OF_MODEL + _varint(total) + nodes)
        for weight, entry, size in zip(builder.weights, entries, sizes, strict=True):
            out.write(_INITIALIZER_OF_GRAPH + _varint(size) + entry)
            if not is_external:
                out.write(_RAW_DATA_OF_TENSOR + _varint(weight.size))
                out.write(_bytes(weight))
        out.flush()
        os.fsync(out.fileno())
    if is_external:
        _write_external(file.with_name(place), builder.weights)


def _write_external(file: Path, weights: Sequence[StoredWeight]) -> None:
    with file.open("wb") as out:
        for weight in weights:
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))
            out.write(_bytes(weight))
        out.flush()
        os.fsync(out.fileno())


def _bytes(weight: StoredWeight) -> memoryview:
    values = np.ascontiguousarray(weight.load())
    assert values.shape == weight.shape and values.nbytes == weight.size, weight.name
    return values.reshape(-1).view(np.uint8).data


def _entry(weight: StoredWeight, place: str, offset: int) -> bytes:
    """Serialise everything of a tensor but its numbers."""
    entry = TensorProto(name=weight.name, data_type=weight.kind, dims=weight.shape)
    if place:
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", str(offset)), ("length", str(weight.size))):
            entry.external_data.add(key=key, value=value)
    return entry.SerializeToString()


def _message_size(entry: bytes, inline: int) -> int:
    """Bytes of a tensor's message with `inline` bytes of numbers in it; 0 for none."""
    return len(entry) + (1 + len(_varint(inline)) + inline if inline else 0)


def _varint(value: int) -> bytes:
    """Encode a whole number in groups of 7 bits, the lowest first."""
    groups = []
    while True:
        groups.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(groups)
