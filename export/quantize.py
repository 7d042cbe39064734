"""Weights of an ONNX graph to int8, activations per token: no neighbour moves your label.

ONNX Runtime's dynamic quantization takes one activation scale for a whole tensor, so a stranger's
dialogue in the same pack would change the rounding of yours. Here every row (token) has its own:

    scale = max|row| / 127        q = uint8(round(row / scale) + 128)
    row x weights  =  MatMulInteger(q, w, zero point 128) * scale * channel scale

The integer sums are exact. Activations are unsigned and weights stay within +-63 because the
AVX2 kernel adds pairs of u8 x s8 products in saturating 16 bits: 2 * 255 * 63 still fits.

Transformers have a few input channels of far greater magnitude than the rest: they coarsen the
scale of every row. Sample inputs show which; those columns can stay in float32 (LLM.int8(),
arXiv 2208.07339, decides by the magnitudes of the batch at hand: here the choice is fixed).
Where the samples are many enough, they also guide how the weights are rounded (export/rounding.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.rounding import Array, Correlation, quantize_rows, quantize_rows_for

AVX2_RANGE = 63
"""Largest weight whose products cannot saturate AVX2's 16-bit pair sums."""
SMALLEST_TABLE = 1 << 16
"""Lookup tables of fewer elements stay as they are: there is little to save."""
FLOAT_COLUMNS = 2
"""Most input channels of a product that keep float32 weights. On all-MiniLM-L6-v2, embeddings have
a mean cosine with the float32 ones of 0.993 with none, 0.998 with 2, and no more with 16."""
OUTLIER = 4.0
"""A channel counts as one when its peak is this many times the median channel's."""

ROWS_PER_CHANNEL = 2
"""Sample rows for each input channel, at least, for the samples to guide the rounding of weights.
Fewer would fit the weights to those rows alone."""

Feed = Mapping[str, npt.NDArray[np.generic]]


def quantize_graph(
    model: ModelProto, *, weight_range: int = AVX2_RANGE, samples: Sequence[Feed] = ()
) -> ModelProto:
    """`quantize_matmuls`, then `quantize_gathers`; in place."""
    return quantize_gathers(quantize_matmuls(model, weight_range=weight_range, samples=samples))


def quantize_matmuls(
    model: ModelProto, *, weight_range: int = AVX2_RANGE, samples: Sequence[Feed] = ()
) -> ModelProto:
    """Quantize every product with a constant float matrix [k, n]; in place.

    That is MatMul, and Gemm with alpha = beta = 1 and no transposed activations. Products of one
    activation share its quantized form.

    Args:
        model: opset 13 or later.
        weight_range: largest absolute int8 weight; 127 only where the CPU has VNNI.
        samples: inputs of the graph. With them, the channels of each activation that reach
            highest keep float32 weights, and the others' rounding errors are made to cancel.
    """
    graph = _Graph(model)
    products = [p for node in model.graph.node if (p := graph.product(node)) is not None]
    seen = _statistics(model, list(dict.fromkeys(p.activation for p in products)), samples)
    for number, product in enumerate(products):
        graph.quantize_product(product, f"product{number}", weight_range, seen)
    graph.finish()
    onnx.checker.check_model(model)
    return model


def quantize_gathers(model: ModelProto, *, smallest_table: int = SMALLEST_TABLE) -> ModelProto:
    """Quantize every large lookup table to int8 rows with a float32 scale each; in place."""
    graph = _Graph(model)
    for node in model.graph.node:
        if node.op_type == "Gather":
            graph.quantize_lookup(node, smallest_table)
    graph.finish()
    onnx.checker.check_model(model)
    return model


def product_weights(model: ModelProto) -> dict[str, Array]:
    """Output -> weight [k, n] of every product with a constant matrix, quantized by
    `quantize_matmuls` or not."""
    graph = _Graph(model)
    products = (graph.product(node) for node in model.graph.node)
    weights = {p.output: p.weight for p in products if p is not None}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    users = {name: node for node in model.graph.node for name in node.input}
    for name in (n.removesuffix("_int8") for n in constants if re.fullmatch(r"product\d+_int8", n)):
        weight = constants[f"{name}_int8"] * constants[f"{name}_scale"]
        output = users[f"{name}_scale"].output[0]
        if f"{name}_columns" in constants:
            floats = users[f"{name}_columns"]
            places = floats.input[0].removesuffix("_floats") + "_columns"
            weight[constants[places]] = constants[f"{name}_columns"]
            output = users[output].output[0]
            del weights[floats.output[0]]
        if output.startswith(f"{name}_"):  # a bias comes last
            output = users[output].output[0]
        weights[output] = weight
    return weights


@dataclass(slots=True)
class _Statistics:
    """Of an activation: how many `rows` were seen, the greatest magnitude of each channel
    (`peaks` [k]), and the sum of the rows' outer products (`correlation` [k, k])."""

    rows: int
    peaks: Array
    correlation: Correlation

    @property
    def enough(self) -> bool:
        """Whether the correlation says something of rows that were not seen."""
        return self.rows >= ROWS_PER_CHANNEL * len(self.peaks)

    def add(self, rows: Array) -> None:
        """Take rows [n, k] in."""
        self.rows += len(rows)
        self.peaks = np.maximum(self.peaks, np.abs(rows).max(axis=0))
        self.correlation += rows.T @ rows


def _statistics(
    model: ModelProto, names: list[str], samples: Sequence[Feed]
) -> dict[str, _Statistics]:
    """What the named activations are over the samples."""
    if not samples or not names:
        return {}
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    seen: dict[str, _Statistics] = {}
    for sample in samples:
        for name, value in zip(names, session.run(None, dict(sample)), strict=True):
            size = value.shape[-1]
            if name not in seen:
                seen[name] = _Statistics(0, np.zeros(size, np.float32), np.zeros((size, size)))
            seen[name].add(value.reshape(-1, size))
    return seen


@dataclass(frozen=True, slots=True)
class _Product:
    """`output` = `activation` [..., k] x `weight` [k, n] (+ `bias`)."""

    activation: str
    weight: Array
    bias: str | None
    output: str


@dataclass(frozen=True, slots=True)
class _Rows:
    """A quantized activation: its uint8 values and the scale of each row.

    `columns` are the channels that are zero in there, and stand in `floats` as they were.
    """

    values: str
    scale: str
    columns: npt.NDArray[np.int64]
    floats: str


class _Graph:
    """A graph under rewriting: nodes are replaced where they stand."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._transposed = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "Transpose"
            and node.input[0] in self._constants
            and list(_attributes(node).get("perm", (1, 0))) == [1, 0]
        }
        self._replaced: dict[str, list[NodeProto]] = {}
        self._rows: dict[str, _Rows] = {}

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def _matrix(self, name: str) -> Array | None:
        """A constant float matrix, transposed where the graph does so; None if it is none."""
        tensor = self._constants.get(self._transposed.get(name, name))
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT:
            return None
        value = numpy_helper.to_array(tensor)
        return value.T if name in self._transposed else value

    def product(self, node: NodeProto) -> _Product | None:
        """The node as a product with a constant matrix, or None."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        weight = self._matrix(node.input[1])
        options = _attributes(node)
        if weight is None or options.get("transA", 0):
            return None
        if any(options.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return None
        if options.get("transB", 0):
            weight = weight.T
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        return _Product(node.input[0], weight, bias, node.output[0])

    def quantize_product(
        self, product: _Product, name: str, limit: int, seen: Mapping[str, _Statistics]
    ) -> None:
        """Replace a product by its per-token int8 form; `name` begins the new names."""
        nodes: list[NodeProto] = []
        statistics = seen.get(product.activation)
        rows = self._per_token(product.activation, nodes, statistics)
        inside = np.ones(len(product.weight), dtype=bool)
        inside[rows.columns] = False
        inner = np.ascontiguousarray((product.weight * inside[:, None]).T)
        if statistics is not None and statistics.enough:
            within = statistics.correlation * np.outer(inside, inside)
            channels, scales = quantize_rows_for(inner, limit, within)
            channels[:, ~inside] = 0
        else:
            channels, scales = quantize_rows(inner, limit)
        weight = self._constant(f"{name}_int8", np.ascontiguousarray(channels.T))
        channel_scale = self._constant(f"{name}_scale", scales[:, 0])
        zero_point = self._constant("rows_zero_point", np.array(128, np.uint8))
        value = _add(nodes, "MatMulInteger", [rows.values, weight, zero_point], f"{name}_sum")
        value = _add(nodes, "Cast", [value], f"{name}_float", to=TensorProto.FLOAT)
        # Two products in a row: were the scales multiplied with each other first, ONNX Runtime
        # would fuse this into MatMulIntegerToFloat, which knows one row scale only.
        value = _add(nodes, "Mul", [value, rows.scale], f"{name}_rows")
        rest = [("Mul", channel_scale)]
        if len(rows.columns):
            columns = self._constant(f"{name}_columns", product.weight[rows.columns])
            rest.append(("Add", _add(nodes, "MatMul", [rows.floats, columns], f"{name}_floats")))
        if product.bias:
            rest.append(("Add", product.bias))
        for step, (operator, operand) in enumerate(rest, start=1):
            output = product.output if step == len(rest) else f"{name}_{step}"
            value = _add(nodes, operator, [value, operand], output)
        self._replaced[product.output] = nodes

    def _per_token(self, x: str, nodes: list[NodeProto], seen: _Statistics | None) -> _Rows:
        """The quantized activation; computed once however many products share it."""
        if x in self._rows:
            return self._rows[x]
        name = f"rows{len(self._rows)}"
        inner, floats = x, ""
        columns = np.empty(0, np.int64) if seen is None else _outliers(seen.peaks)
        if seen is not None and len(columns):
            channels = np.arange(len(seen.peaks))
            inside = self._constant(f"{name}_inside", ~np.isin(channels, columns))
            zero = self._constant("rows_zero", np.array(0, np.float32))
            inner = _add(nodes, "Where", [inside, x, zero], f"{name}_inner")
            places = self._constant(f"{name}_columns", columns)
            floats = _add(nodes, "Gather", [x, places], f"{name}_floats", axis=-1)
        steps = self._constant("rows_127", np.array(127, np.float32))
        shift = self._constant("rows_128", np.array(128, np.float32))
        least = self._constant("rows_least", np.array(1e-30, np.float32))  # for a row of zeros
        highest = _add(nodes, "Abs", [inner], f"{name}_abs")
        if self._opset < 18:
            highest = _add(nodes, "ReduceMax", [highest], f"{name}_max", axes=[-1])
        else:
            axes = self._constant("rows_axes", np.array([-1], np.int64))
            highest = _add(nodes, "ReduceMax", [highest, axes], f"{name}_max")
        scale = _add(nodes, "Div", [highest, steps], f"{name}_step")
        scale = _add(nodes, "Max", [scale, least], f"{name}_scale")
        value = _add(nodes, "Div", [inner, scale], f"{name}_ratio")
        value = _add(nodes, "Round", [value], f"{name}_round")
        value = _add(nodes, "Add", [value, shift], f"{name}_shifted")
        value = _add(nodes, "Cast", [value], name, to=TensorProto.UINT8)
        self._rows[x] = _Rows(value, scale, columns, floats)
        return self._rows[x]

    def quantize_lookup(self, node: NodeProto, smallest: int) -> None:
        """Replace a Gather from a large float table by one from int8 rows and their scales."""
        table = self._matrix(node.input[0])
        if table is None or _attributes(node).get("axis", 0) != 0 or table.size < smallest:
            return
        source, name = node.input[0], node.output[0]
        nodes: list[NodeProto] = []
        values, scales = quantize_rows(table, 127)
        rows = self._constant(f"{source}_int8", values)
        scale = self._constant(f"{source}_scale", scales)
        rows = _add(nodes, "Gather", [rows, node.input[1]], f"{name}_int8", axis=0)
        scale = _add(nodes, "Gather", [scale, node.input[1]], f"{name}_scale", axis=0)
        value = _add(nodes, "Cast", [rows], f"{name}_float", to=TensorProto.FLOAT)
        _add(nodes, "Mul", [value, scale], name)
        self._replaced[name] = nodes

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


def _outliers(peaks: Array) -> npt.NDArray[np.int64]:
    """The channels that reach far higher than most, in order."""
    highest = np.argsort(-peaks, kind="stable")[:FLOAT_COLUMNS]
    return np.sort(highest[peaks[highest] > OUTLIER * np.median(peaks)])


def _add(
    nodes: list[NodeProto], operator: str, inputs: list[str], output: str, **attributes: Any
) -> str:
    nodes.append(helper.make_node(operator, inputs, [output], **attributes))
    return output


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
