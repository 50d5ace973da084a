"""The encoder as an ONNX graph: the forward of `encoder.model.decoder`, with padding, and pooling in the graph.

    input_ids, attention_mask  int64 [n, t]        padded on the right
    last_hidden_state          float32 [n, t, W]   zero where a token is not pooled: a plain mean, scaled, is exact too
    sentence_embedding         float32 [n, D]      pooled, behind the head, cut, of length 1

BOS, template and instruction are recognised by their ids at the beginning of a sequence, so a caller puts a prompt
before a text as a string and needs no mask of its own.

Dimension letters as in `decoder`; r query heads share a key head, P is the length of the longest known beginning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from unmask.encoder.head import head_steps
from unmask.encoder.model.architectures import Rope, Shape
from unmask.export.capabilities import ExportedModel
from unmask.export.onnx_weights import WeightStore
from unmask.export.onnx_writer import GraphBuilder

_MASKED = -3.0e4  # added to the score of a token that is not attended to
_ACTIVATIONS: Mapping[str, str] = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


@dataclass(frozen=True)
class Beginning:
    """Ids that begin a sequence and are not pooled.

    Attributes:
        ids: compared with the sequence.
        skip: tokens that are left out of the pooling where they match.
        spaced: a token that is a lone space behind them is left out too: it joins instruction and text.
    """

    ids: tuple[int, ...]
    skip: int
    spaced: bool


def beginnings_of(model: ExportedModel) -> list[Beginning]:
    """Return the beginnings of a model's sequences for each of its prompts, and for none."""
    tokenizer = model.checkpoint.tokenizer.plain

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []

    parts, skips = model.parts, model.prompts.skip_instruction
    if model.is_plain:
        if not skips:
            return []
        openings = [model.prompts.opening(text) for text in model.instructions.values() if text]
        begins = []
        for opening in openings:
            ids = [*parts.bos, *encode(opening)]
            # The last token of a prompt may join with the text; sentence-transformers counts it all the same.
            begins.append(Beginning(tuple(ids[:-1] if opening[-1:].isspace() else ids), len(ids), False))
        return begins
    if not skips:
        return [Beginning(parts.bos, len(parts.bos), False)] if parts.bos else []
    openings = dict.fromkeys(model.prompts.opening(text) for text in ("", *model.instructions.values()))
    begins = []
    for opening in openings:
        spaced = opening.endswith(" ")
        ids = (*parts.head, *encode(opening[:-1] if spaced else opening))
        begins.append(Beginning(ids, len(ids), spaced))
    return [beginning for beginning in begins if beginning.ids or beginning.spaced]


def build_graph(model: ExportedModel, weights: WeightStore) -> tuple[GraphBuilder, onnx.GraphProto]:
    """Build the graph of a model.

    Args:
        weights: reads the model's tensors in the precision of the file.
    """
    shape = model.shape
    assert shape is not None  # the verdict has refused other models
    builder = weights.builder
    stack = _Stack(builder, weights, shape, model.causal)
    states = stack.states("input_ids", "attention_mask")  # [n, t, W]
    pooling = _Pooling(builder, model)
    weight = pooling.weights("input_ids", "attention_mask")  # [n, t]
    column = builder.op("Unsqueeze", weight, builder.integers(-1))
    if model.pooling == "mean":
        states = builder.op("Mul", states, column, output="last_hidden_state")
        summed = builder.op("ReduceSum", states, builder.integers(1), keepdims=0)
    else:
        summed = builder.op("ReduceSum", builder.op("Mul", states, column), builder.integers(1), keepdims=0)
        states = builder.op("Identity", states, output="last_hidden_state")
    total = builder.op("ReduceSum", weight, builder.integers(1), keepdims=1)
    pooled = builder.op("Div", summed, builder.op("Max", total, builder.number(1.0)))
    vector, size = _head(builder, model, weights, pooled)
    _unit_length(builder, vector, output="sentence_embedding")
    batch: list[Any] = ["batch", "tokens"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, batch) for name in ("input_ids", "attention_mask")]
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*batch, shape.hidden_size]),
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", size]),
    ]
    return builder, builder.graph(inputs, outputs)


class _Stack:
    """The decoder's layers as nodes."""

    def __init__(self, builder: GraphBuilder, weights: WeightStore, shape: Shape, causal: bool) -> None:
        self.b, self.w, self.s, self.causal = builder, weights, shape, causal

    def states(self, ids: str, mask: str) -> str:
        b, s = self.b, self.s
        x = self.w.rows("embed_tokens.weight", ids)  # [n, t, W]
        if s.embedding_scale != 1.0:
            x = b.op("Mul", x, b.number(s.embedding_scale))
        length = b.op("Gather", b.op("Shape", ids), b.integers(1))  # [1]
        scalar = b.op("Squeeze", length)
        positions = b.op("Range", b.constant(np.array(0)), scalar, b.constant(np.array(1)))  # [t]
        angles = {rope: self._angles(rope, positions) for rope in dict.fromkeys(s.ropes)}
        masks = {window: self._mask(window, mask, positions) for window in dict.fromkeys(s.windows)}
        for i, (rope, window) in enumerate(zip(s.ropes, s.windows, strict=True)):
            x = self._layer(f"layers.{i}", x, angles[rope], masks[window])
        return self._norm(x, "norm.weight")

    def _layer(self, name: str, x: str, angles: tuple[str, str], mask: str) -> str:
        b, s = self.b, self.s
        attended = self._attention(f"{name}.self_attn", self._norm(x, f"{name}.input_layernorm.weight"), angles, mask)
        if s.sandwich_norm:
            attended = self._norm(attended, f"{name}.post_attention_layernorm.weight")
        x = b.op("Add", x, attended)
        before = "pre_feedforward_layernorm" if s.sandwich_norm else "post_attention_layernorm"
        transformed = self._mlp(f"{name}.mlp", self._norm(x, f"{name}.{before}.weight"))
        if s.sandwich_norm:
            transformed = self._norm(transformed, f"{name}.post_feedforward_layernorm.weight")
        return b.op("Add", x, transformed)

    def _norm(self, x: str, name: str) -> str:
        """RMSNorm over the last axis."""
        b = self.b
        square = b.op("ReduceMean", b.op("Mul", x, x), b.integers(-1), keepdims=1)
        root = b.op("Sqrt", b.op("Add", square, b.number(self.s.eps)))
        return b.op("Mul", b.op("Div", x, root), self.w.vector(name, self.s.norm_offset))

    def _attention(self, name: str, x: str, angles: tuple[str, str], mask: str) -> str:
        b, s = self.b, self.s
        r = s.heads // s.kv_heads
        turned = self.w.turn(x, s.hidden_size)
        q, k, v = (self.w.linear(f"{name}.{part}_proj", turned, s.qkv_bias) for part in "qkv")
        q = b.op("Reshape", q, b.integers(0, 0, s.heads, s.head_dim))  # [n, t, H, D]
        k, v = (b.op("Reshape", part, b.integers(0, 0, s.kv_heads, s.head_dim)) for part in (k, v))  # [n, t, K, D]
        if s.qk_norm:
            q, k = self._norm(q, f"{name}.q_norm.weight"), self._norm(k, f"{name}.k_norm.weight")
        q, k = (self._rotate(part, angles) for part in (q, k))
        q = b.op("Reshape", q, b.integers(0, 0, s.kv_heads, r, s.head_dim))
        q = b.op("Transpose", q, perm=[0, 2, 3, 1, 4])  # [n, K, r, t, D]
        k = b.op("Unsqueeze", b.op("Transpose", k, perm=[0, 2, 3, 1]), b.integers(2))  # [n, K, 1, D, t]
        v = b.op("Unsqueeze", b.op("Transpose", v, perm=[0, 2, 1, 3]), b.integers(2))  # [n, K, 1, t, D]
        scores = b.op("MatMul", b.op("Mul", q, b.number(s.attention_scale)), k)  # [n, K, r, t, t]
        if s.softcap is not None:
            squashed = b.op("Tanh", b.op("Div", scores, b.number(s.softcap)))
            scores = b.op("Mul", squashed, b.number(s.softcap))
        shares = b.op("Softmax", b.op("Add", scores, mask), axis=-1)
        out = b.op("Transpose", b.op("MatMul", shares, v), perm=[0, 3, 1, 2, 4])  # [n, t, K, r, D]
        out = b.op("Reshape", out, b.integers(0, 0, s.heads * s.head_dim))
        return self.w.linear(f"{name}.o_proj", self.w.turn(out, s.heads * s.head_dim), s.out_bias)

    def _rotate(self, x: str, angles: tuple[str, str]) -> str:
        """x [n, t, heads, D]; cos, sin [1, t, 1, D/2]."""
        b, (cos, sin) = self.b, angles
        first, second = b.halves(x)
        return b.op(
            "Concat",
            b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
            b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)),
            axis=-1,
        )

    def _angles(self, rope: Rope, positions: str) -> tuple[str, str]:
        """cos and sin of every position: [1, t, 1, D/2] each."""
        b = self.b
        frequencies = b.constant(rope.frequencies(self.s.head_dim).numpy().reshape(1, 1, 1, -1))
        column = b.op("Reshape", b.op("Cast", positions, to=TensorProto.FLOAT), b.integers(1, -1, 1, 1))
        angles = b.op("Mul", column, frequencies)
        return b.op("Cos", angles), b.op("Sin", angles)

    def _mask(self, window: int | None, mask: str, positions: str) -> str:
        """Numbers to add to scores, 0 or very small: [n, 1, 1, t, t], or [n, 1, 1, 1, t] where padding alone counts."""
        b = self.b
        allowed = b.op("Cast", b.op("Unsqueeze", mask, b.integers(1, 2, 3)), to=TensorProto.BOOL)  # [n, 1, 1, 1, t]
        if window is not None or self.causal:
            row, column = (b.op("Unsqueeze", positions, b.integers(axis)) for axis in (1, 0))
            distance = b.op("Sub", row, column)  # [t, t]
            if window is not None:
                reach = b.constant(np.array(window - 1 if self.causal else window))
                allowed = b.op("And", allowed, b.op("LessOrEqual", b.op("Abs", distance), reach))
            if self.causal:
                allowed = b.op("And", allowed, b.op("GreaterOrEqual", distance, b.constant(np.array(0))))
        return b.op("Where", allowed, b.number(0.0), b.number(_MASKED))

    def _mlp(self, name: str, x: str) -> str:
        b, s = self.b, self.s
        turned = self.w.turn(x, s.hidden_size)
        gate, up = (self.w.linear(f"{name}.{part}_proj", turned, s.mlp_bias) for part in ("gate", "up"))
        gate = b.op("Mul", gate, b.op("Sigmoid", gate)) if s.activation == "silu" else gelu_tanh(b, gate)
        return self.w.linear(f"{name}.down_proj", self.w.turn(b.op("Mul", gate, up), s.intermediate_size), s.mlp_bias)


class _Pooling:
    """Weight of each token in the vector of its sequence."""

    def __init__(self, builder: GraphBuilder, model: ExportedModel) -> None:
        self.b, self.model = builder, model

    def weights(self, ids: str, mask: str) -> str:
        """Return float32 [n, t]."""
        b, pooling = self.b, self.model.pooling
        length = b.op("Squeeze", b.op("Gather", b.op("Shape", ids), b.integers(1)))
        positions = b.op("Range", b.constant(np.array(0)), length, b.constant(np.array(1)))
        positions = b.op("Unsqueeze", positions, b.integers(0))  # [1, t]
        if pooling in ("last_token", "eos_token"):
            last = b.op("Sub", b.op("ReduceSum", mask, b.integers(1), keepdims=1), b.constant(np.array(1)))
            return b.op("Cast", b.op("Equal", positions, last), to=TensorProto.FLOAT)
        begins = [] if pooling == "bos_token" else beginnings_of(self.model)
        skip = self._skipped(ids, begins) if begins else b.integers(0)
        if pooling in ("first_token", "bos_token"):
            first = b.op("Equal", b.op("Mul", positions, mask), skip)
            return b.op("Mul", *(b.op("Cast", part, to=TensorProto.FLOAT) for part in (first, mask)))
        pooled = b.op("Cast", b.op("GreaterOrEqual", positions, skip), to=TensorProto.INT64)
        pooled = b.op("Mul", pooled, mask)  # [n, t]
        if pooling == "weighted_mean":
            place = b.op("Add", b.op("Sub", positions, skip), b.constant(np.array(1)))
            pooled = b.op("Mul", pooled, place)
        return b.op("Cast", pooled, to=TensorProto.FLOAT)

    def _skipped(self, ids: str, begins: Sequence[Beginning]) -> str:
        """Tokens at the beginning of each sequence that are not pooled: int64 [n, 1]."""
        b = self.b
        longest = max(max(len(begin.ids), begin.skip) for begin in begins) + 1
        pads = b.integers(0, 0, 0, longest)
        padded = b.op("Pad", ids, pads, b.constant(np.array(-2)))  # [n, t+P], so that P columns are always there
        first = b.op("Slice", padded, b.integers(0), b.integers(longest), b.integers(1))  # [n, P]
        table = np.full((1, len(begins), longest), -1)
        for row, begin in enumerate(begins):
            table[0, row, : len(begin.ids)] = begin.ids
        beginnings = b.constant(table)
        equal = b.op("Equal", b.op("Unsqueeze", first, b.integers(1)), beginnings)  # [n, k, P]
        beyond = b.constant(table < 0)
        matches = b.op("Cast", b.op("Or", equal, beyond), to=TensorProto.INT64)
        matches = b.op("ReduceMin", matches, b.integers(-1), keepdims=0)  # [n, k]
        # Skip and flag in one number: the longest match counts.
        codes = b.constant(np.array([[2 * begin.skip + begin.spaced for begin in begins]]))
        code = b.op("ReduceMax", b.op("Mul", matches, codes), b.integers(-1), keepdims=1)  # [n, 1]
        two = b.constant(np.array(2))
        skip, spaced = b.op("Div", code, two), b.op("Mod", code, two)
        space = self._lone_space()
        if space is None or not any(begin.spaced for begin in begins):
            return skip
        behind = b.op("GatherElements", padded, skip, axis=1)  # [n, 1]
        is_space = b.op("Cast", b.op("Equal", behind, b.constant(np.array(space))), to=TensorProto.INT64)
        return b.op("Add", skip, b.op("Mul", is_space, spaced))

    def _lone_space(self) -> int | None:
        """Id of the token that is a space and nothing else."""
        tokenizer = self.model.checkpoint.tokenizer.text
        ids = (tokenizer.token_to_id(token) for token in ("\u0120", "\N{LOWER ONE EIGHTH BLOCK}", " "))
        return next((token for token in ids if token is not None), None)


def _head(builder: GraphBuilder, model: ExportedModel, weights: WeightStore, x: str) -> tuple[str, int]:
    """Add the steps behind the pooling and the cut; return the vector and its length."""
    assert model.shape is not None
    b, size, layer = builder, model.shape.hidden_size, 0
    tensors = model.checkpoint.tensors
    steps = [dict(step) for step in head_steps(tensors, model.checkpoint.encoder_config)]
    if model.dimensions is not None:
        steps.append({"kind": "truncate", "dimensions": model.dimensions})
    for step in steps:
        if step["kind"] == "normalize":
            x = _unit_length(b, x)
        elif step["kind"] == "truncate":
            size = min(size, int(step["dimensions"]))
            x = b.op("Slice", x, b.integers(0), b.integers(size), b.integers(1))
        else:
            x = weights.plain_linear(f"head.{layer}", x)
            x = _activate(b, str(step.get("activation", "identity")), x)
            size, layer = tensors.shape(f"head.{layer}.weight")[0], layer + 1
    return x, size


def _activate(b: GraphBuilder, name: str, x: str) -> str:
    if name == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if name == "gelu":
        half = b.op("Mul", x, b.number(0.5))
        return b.op("Mul", half, b.op("Add", b.op("Erf", b.op("Mul", x, b.number(2**-0.5))), b.number(1.0)))
    return b.op(_ACTIVATIONS[name], x) if name in _ACTIVATIONS else x


def gelu_tanh(b: GraphBuilder, x: str) -> str:
    """GELU in its tanh form; the operator itself came with opset 20."""
    cube = b.op("Mul", b.op("Mul", x, x), x)
    inner = b.op("Add", x, b.op("Mul", cube, b.number(0.044715)))
    squashed = b.op("Tanh", b.op("Mul", inner, b.number(float(torch.tensor(2 / torch.pi).sqrt()))))
    return b.op("Mul", b.op("Mul", x, b.number(0.5)), b.op("Add", squashed, b.number(1.0)))


def _unit_length(b: GraphBuilder, x: str, output: str = "") -> str:
    norm = b.op("ReduceL2", x, b.integers(-1), keepdims=1)
    return b.op("Div", x, b.op("Max", norm, b.number(1e-12)), output=output)
