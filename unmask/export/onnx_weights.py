"""Weights of an ONNX graph in 32, 16 or 8 bits, and the nodes that read them.

16 bits store weights; the graph computes in float32, so nothing can overflow and every runtime reads the file.

8 bits are ONNX Runtime's MatMulNBits with blocks of 32, which scales activations by row and block. Its dynamic int8 has
one scale for a whole batch, and gave cosines down to 0.26. Inputs are turned by a Hadamard matrix in blocks of 64 first
(arXiv 2404.00456), and weights with them: the product is the same, and no channel is louder than the rest.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from onnx import TensorProto

from unmask.checkpoint.tensors import TensorSource
from unmask.export.onnx_writer import GraphBuilder, StoredWeight

_BLOCK = 32  # numbers that share a scale
_TURNED = 64  # size of the Hadamard matrix
_KINDS = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16)}


class WeightStore:
    """Adds a decoder's tensors to a graph.

    Args:
        tensors: of the model.
        dtype: float32, float16 or q8.
    """

    def __init__(self, tensors: TensorSource, dtype: str) -> None:
        self.builder = GraphBuilder()
        self._tensors, self._dtype = tensors, dtype

    def rows(self, name: str, ids: str) -> str:
        """Look up rows of a matrix; 8 bits store it in 16."""
        b = self.builder
        stored = self._plain(name, transposed=False, dtype="float32" if self._dtype == "float32" else "float16")
        rows = b.op("Gather", stored, ids, axis=0)
        return rows if self._dtype == "float32" else b.op("Cast", rows, to=TensorProto.FLOAT)

    def vector(self, name: str, offset: float = 0.0) -> str:
        """Add a vector with `offset` added to its numbers, float32."""
        return self.builder.constant(self._tensors.read(name).float().numpy() + np.float32(offset))

    def turn(self, x: str, size: int) -> str:
        """Turn the last axis of an input for the 8-bit products with it; other precisions leave it."""
        if self._dtype != "q8" or size % _TURNED:
            return x
        b = self.builder
        blocks = b.op("Reshape", x, b.integers(0, 0, size // _TURNED, _TURNED))
        return b.op("Reshape", b.op("MatMul", blocks, b.constant(hadamard(_TURNED))), b.integers(0, 0, size))

    def linear(self, name: str, x: str, bias: bool) -> str:
        """Multiply by a weight [out, in], which `turn` has prepared the input for, and add a bias."""
        out = self._product_q8(f"{name}.weight", x) if self._dtype == "q8" else self._product(f"{name}.weight", x)
        return self.builder.op("Add", out, self.vector(f"{name}.bias")) if bias else out

    def plain_linear(self, name: str, x: str) -> str:
        """A linear layer in float32 with its bias."""
        product = self.builder.op("MatMul", x, self._plain(f"{name}.weight", transposed=True, dtype="float32"))
        return self.builder.op("Add", product, self.vector(f"{name}.bias"))

    def _product(self, name: str, x: str) -> str:
        weight = self._plain(name, transposed=True, dtype=self._dtype)
        if self._dtype != "float32":
            weight = self.builder.op("Cast", weight, to=TensorProto.FLOAT)
        return self.builder.op("MatMul", x, weight)

    def _plain(self, name: str, *, transposed: bool, dtype: str) -> str:
        shape = self._tensors.shape(name)
        kind, number = _KINDS[dtype]

        def load() -> np.ndarray:
            values = self._tensors.read(name).float().numpy()
            return np.ascontiguousarray(values.T if transposed else values, dtype=number)

        return self.builder.weight(StoredWeight(name, kind, shape[::-1] if transposed else shape, load))

    def _product_q8(self, name: str, x: str) -> str:
        outputs, inputs = self._tensors.shape(name)
        blocks = -(-inputs // _BLOCK)
        load_steps, load_sizes = self._quantised(name)
        steps = StoredWeight(f"{name}.steps", TensorProto.UINT8, (outputs, blocks, _BLOCK), load_steps)
        sizes = StoredWeight(f"{name}.sizes", TensorProto.FLOAT, (outputs * blocks,), load_sizes)
        return self.builder.op(
            "MatMulNBits",
            x,
            self.builder.weight(steps),
            self.builder.weight(sizes),
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=8,
            block_size=_BLOCK,
            accuracy_level=4,  # activations in 8 bits too
        )

    def _quantised(self, name: str) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
        """Loaders of steps and sizes. A file holds the steps first, and the sizes wait for their turn meanwhile."""
        waiting: list[np.ndarray] = []

        def load_steps() -> np.ndarray:
            weight = self._tensors.read(name).float().numpy()
            outputs, inputs = weight.shape
            if inputs % _TURNED == 0:
                weight = (weight.reshape(outputs, -1, _TURNED) @ hadamard(_TURNED)).reshape(outputs, inputs)
            steps, sizes = block_steps(weight)
            waiting[:] = [sizes]
            return steps

        return load_steps, lambda: waiting.pop()


def block_steps(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix [out, in] in blocks of 32 along its rows.

    Returns:
        Steps above 128, uint8 [out, blocks, 32], and the size of a step, float32 [out * blocks].
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // _BLOCK)
    padded = np.zeros((outputs, blocks * _BLOCK), dtype=np.float32)
    padded[:, :inputs] = weight
    values = padded.reshape(outputs, blocks, _BLOCK)
    sizes = np.abs(values).max(axis=2) / 127  # [out, blocks]
    steps = np.rint(values / np.maximum(sizes, np.finfo(np.float32).tiny)[:, :, None])
    return (np.clip(steps, -127, 127) + 128).astype(np.uint8), sizes.reshape(-1).astype(np.float32)


@cache
def hadamard(size: int) -> np.ndarray:
    """Return the orthonormal Hadamard matrix of a power of two, float32 [size, size]; it is its own inverse."""
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)
