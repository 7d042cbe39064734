"""Weights of an ONNX graph to int8, activations per token: no neighbour moves your label.

ONNX Runtime's dynamic quantization takes one activation scale for a whole tensor, so a stranger's
dialogue in the same pack would change the rounding of yours. Here every row (token) has its own:

    scale = max|row| / 127        q = uint8(round(row / scale) + 128)
    row x weights  =  MatMulInteger(q, w, zero point 128) * scale * channel scale

The integer sums are exact. Activations are unsigned and weights stay within +-63 because the
AVX2 kernel adds pairs of u8 x s8 products in saturating 16 bits: 2 * 255 * 63 still fits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

AVX2_RANGE = 63
"""Largest weight whose products cannot saturate AVX2's 16-bit pair sums."""


def quantize_rows(
    table: npt.NDArray[np.float32], limit: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(int8 [rows, n] within +-limit, float32 scales [rows, 1]) of a table [rows, n]."""
    scales = np.abs(table).max(axis=1, keepdims=True) / limit
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.round(table / scales).clip(-limit, limit).astype(np.int8), scales


def quantize_graph(
    model: ModelProto, *, weight_range: int = AVX2_RANGE, smallest_table: int = 1 << 16
) -> ModelProto:
    """Quantize every product with a constant matrix and every large lookup table, in place.

    Args:
        model: opset 13 or later.
        weight_range: largest absolute int8 weight of the products.
        smallest_table: lookup tables of fewer elements stay as they are.
    """
    graph = _Graph(model)
    for node in list(model.graph.node):
        if node.op_type in ("MatMul", "Gemm"):
            graph.quantize_product(node, weight_range)
        elif node.op_type == "Gather":
            graph.quantize_lookup(node, smallest_table)
    graph.finish()
    onnx.checker.check_model(model)
    return model


class _Graph:
    """A graph under rewriting: nodes are replaced where they stand."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._transposed = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "Transpose"
            and node.input[0] in self._constants
            and len(self._constants[node.input[0]].dims) == 2
        }
        self._replaced: dict[str, list[NodeProto]] = {}
        self._rows: dict[str, tuple[str, str]] = {}
        self._tables: dict[str, tuple[str, str]] = {}
        self._constant("per_token_127", np.array(127, np.float32))
        self._constant("per_token_128", np.array(128, np.float32))
        self._constant("per_token_zero_point", np.array(128, np.uint8))
        self._constant("per_token_least", np.array(1e-30, np.float32))
        self._constant("per_token_axis", np.array([-1], np.int64))

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def _matrix(self, name: str) -> npt.NDArray[np.float32] | None:
        transposed = name in self._transposed
        tensor = self._constants.get(self._transposed.get(name, name))
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT:
            return None
        value = numpy_helper.to_array(tensor)
        return np.ascontiguousarray(value.T if transposed else value)

    def quantize_product(self, node: NodeProto, limit: int) -> None:
        """Replace a MatMul, or a Gemm with alpha = beta = 1, by its per-token int8 form."""
        weight = self._matrix(node.input[1])
        if weight is None:
            return
        bias = None
        if node.op_type == "Gemm":
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if attributes.get("transA", 0) or any(
                attributes.get(name, 1.0) != 1.0 for name in ("alpha", "beta")
            ):
                return
            if attributes.get("transB", 0):
                weight = np.ascontiguousarray(weight.T)
            bias = node.input[2] if len(node.input) > 2 else None
        columns, scales = quantize_rows(np.ascontiguousarray(weight.T), limit)
        name = node.output[0]
        self._constant(f"{name}_int8", np.ascontiguousarray(columns.T))
        self._constant(f"{name}_scale", scales[:, 0])
        nodes: list[NodeProto] = []
        quantized, row_scale = self._per_token(node.input[0], nodes)
        product = f"{name}_product" if bias else name
        nodes += [
            helper.make_node(
                "MatMulInteger",
                [quantized, f"{name}_int8", "per_token_zero_point"],
                [f"{name}_sum"],
            ),
            helper.make_node("Cast", [f"{name}_sum"], [f"{name}_float"], to=TensorProto.FLOAT),
            # Two products in a row: were the scales multiplied with each other first, ONNX
            # Runtime would fuse this into MatMulIntegerToFloat, which knows one row scale only.
            helper.make_node("Mul", [f"{name}_float", row_scale], [f"{name}_rows_scaled"]),
            helper.make_node("Mul", [f"{name}_rows_scaled", f"{name}_scale"], [product]),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [name]))
        self._replaced[name] = nodes

    def _per_token(self, x: str, nodes: list[NodeProto]) -> tuple[str, str]:
        """(quantized, scale) of an activation; computed once however many products share it."""
        if x not in self._rows:
            quantized, scale = f"{x}_rows", f"{x}_row_scale"
            steps = [
                ("Abs", [x], "abs"),
                ("ReduceMax", [f"{x}_row_abs", "per_token_axis"], "max"),
                ("Div", [f"{x}_row_max", "per_token_127"], "wide"),
                ("Max", [f"{x}_row_wide", "per_token_least"], "scale"),
                ("Div", [x, scale], "ratio"),
                ("Round", [f"{x}_row_ratio"], "round"),
                ("Add", [f"{x}_row_round", "per_token_128"], "shift"),
            ]
            for operator, inputs, output in steps:
                nodes.append(helper.make_node(operator, inputs, [f"{x}_row_{output}"]))
            nodes.append(
                helper.make_node("Cast", [f"{x}_row_shift"], [quantized], to=TensorProto.UINT8)
            )
            self._rows[x] = quantized, scale
        return self._rows[x]

    def quantize_lookup(self, node: NodeProto, smallest: int) -> None:
        """Replace a Gather from a large float table by one from int8 rows and their scales."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        table = self._matrix(node.input[0])
        if table is None or axis != 0 or table.size < smallest:
            return
        source, name = node.input[0], node.output[0]
        if source not in self._tables:
            rows, scales = quantize_rows(table, 127)
            self._tables[source] = (
                self._constant(f"{source}_rows_int8", rows),
                self._constant(f"{source}_rows_scale", scales),
            )
        rows_name, scales_name = self._tables[source]
        self._replaced[name] = [
            helper.make_node("Gather", [rows_name, node.input[1]], [f"{name}_int8"], axis=0),
            helper.make_node("Gather", [scales_name, node.input[1]], [f"{name}_scale"], axis=0),
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]),
        ]

    def finish(self) -> None:
        """Put the new nodes in, and drop nodes and constants that nothing reads any more."""
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            nodes += self._replaced.get(node.output[0], [node])
        needed = {output.name for output in self._graph.output}
        kept: list[NodeProto] = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        del self._graph.initializer[:]
        self._graph.initializer.extend(t for name, t in self._constants.items() if name in needed)
        del self._graph.value_info[:]
