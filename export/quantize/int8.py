"""Weights of an ONNX graph to int8, activations per token: no neighbour moves your label.

ONNX Runtime's dynamic quantization takes one activation scale for a whole tensor, so a stranger's
dialogue in the same pack would change the rounding of yours. Here every row (token) has its own:

    scale = max|row| / 127        q = uint8(round(row / scale) + 128)
    row x weights  =  integer product (q - 128, w) * channel scale * scale

The integer sums are exact. Activations are unsigned and weights stay within +-63 because the
AVX2 kernel adds pairs of u8 x s8 products in saturating 16 bits: 2 * 255 * 63 still fits.
Processors with VNNI, and those of ARM, add in 32 bits: there weights use the full range.

Transformers have a few input channels of far greater magnitude than the rest: they coarsen the
scale of every row. Sample inputs show which; those columns can stay in float32 (LLM.int8(),
arXiv 2208.07339, decides by the magnitudes of the batch at hand: here the choice is fixed).
Where the samples are many enough, they also guide how the weights are rounded
(export/quantize/rounding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ercbatch.scoring.onnx_scorer import PROBE_SHAPE
from export.graph.nodes import MICROSOFT, Array, Graph, Product, add_node, attributes
from export.quantize.rounding import quantize_rows, round_alone, round_together, row_scales
from export.quantize.statistics import Sampler, Statistics
from export.quantize.targets import SAFE_TARGET, WEIGHT_RANGE

SMALLEST_TABLE = 1 << 16
"""Lookup tables of fewer elements stay as they are: there is little to save."""
_FLOAT_COLUMNS = 2
"""Most input channels of a product that keep float32 weights. On all-MiniLM-L6-v2, embeddings have
a mean cosine with the float32 ones of 0.993 with none, 0.998 with 2, and no more with 16."""
_OUTLIER = 4.0
"""A channel counts as one when its peak is this many times the median channel's."""
_INT8, _SCALE, _COLUMNS = "_int8", "_scale", "_columns"
"""What the names of a weight's quantized parts end with: int8 values, the scales of its channels,
and its rows in float32."""
_TABLE, _TABLE_SCALE = "_table_int8", "_table_scale"
"""The same of a lookup table: int8 rows, and the scale of each."""
_MAX_CORRELATION_BYTES = 1 << 30
"""Bytes of correlations that are gathered in one run over the samples."""


def quantize_products(
    graph: Graph, *, weight_range: int = WEIGHT_RANGE[SAFE_TARGET], sampler: Sampler | None = None
) -> None:
    """Quantize every product of a graph with a constant float matrix.

    Products of one activation share its quantized form.

    Args:
        graph: see `Graph`; its constants are called after the weights.
        weight_range: largest absolute int8 weight; more than 63 only where the processor has VNNI.
        sampler: what weights are multiplied with. With it, the channels of each activation that
            reach highest keep float32 weights, and the others' rounding errors are made to cancel.
    """
    rewriting = _PerToken(graph, weight_range)
    for products, statistics in sample_products(graph, sampler):
        rewriting.quantize(products, statistics)
    graph.apply()


def sample_products(
    graph: Graph, sampler: Sampler | None
) -> Iterator[tuple[list[Product], Statistics | None]]:
    """The products of each activation, with what that is like over the samples."""
    by_activation: dict[str, list[Product]] = {}
    for product in graph.products():
        by_activation.setdefault(product.activation, []).append(product)
    pending = list(by_activation.values())
    while pending:
        batch, size = [pending.pop(0)], 0
        while pending and size < _MAX_CORRELATION_BYTES:
            size += 4 * _input_size(graph, pending[0][0]) ** 2
            batch.append(pending.pop(0))
        statistics = dict(sampler([products[0].weight for products in batch])) if sampler else {}
        for products in batch:
            yield products, statistics.pop(products[0].weight, None)  # used up: they are large


def quantize_lookups(graph: Graph, *, smallest_table: int = SMALLEST_TABLE) -> None:
    """Quantize every large lookup table of a graph to int8 rows with a float32 scale each."""
    for node in graph.nodes:
        if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
            continue
        table, name = graph.source(node.input[0]), node.output[0]
        shape = graph.shape(table) or (0,)
        if not graph.is_matrix(table) or np.prod(shape) < smallest_table:
            continue
        values, scales = quantize_rows(graph.value(table), 127)
        rows = graph.constant(table + _TABLE, values)
        scale = graph.constant(table + _TABLE_SCALE, scales)
        nodes: list[NodeProto] = []
        rows = add_node(nodes, "Gather", [rows, node.input[1]], f"{name}_int8", axis=0)
        scale = add_node(nodes, "Gather", [scale, node.input[1]], f"{name}_scale", axis=0)
        value = add_node(nodes, "Cast", [rows], f"{name}_float", to=TensorProto.FLOAT)
        add_node(nodes, "Mul", [value, scale], name)
        graph.replace(node, nodes)
    graph.apply()


def probe() -> ModelProto:
    """A product of weights 127 with unsigned 8-bit activations, by which a machine is tried."""
    rows, inputs = PROBE_SHAPE
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, inputs])],
        [numpy_helper.from_array(np.full((inputs, inputs), 127, np.int8), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored_weights(model: ModelProto) -> tuple[dict[str, Array], dict[str, Array]]:
    """The quantized weights of a model, by name.

    Lookup tables [rows, n] are as they were, matrices [inputs, outputs] as their products take
    them.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    names = [name.removesuffix(_TABLE) for name in constants if name.endswith(_TABLE)]
    tables = {name: constants[name + _TABLE] * constants[name + _TABLE_SCALE] for name in names}
    matrices = {}
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            name = node.input[1].removesuffix(_INT8)
            matrices[name] = constants[name + _INT8] * constants[name + _SCALE]
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1].endswith(_COLUMNS):
            channels = constants[producers[node.input[0]].input[1]]
            matrices[node.input[1].removesuffix(_COLUMNS)][channels] = constants[node.input[1]]
    return tables, matrices


@dataclass(frozen=True, slots=True)
class _Rows:
    """A quantized activation: uint8 values [rows, k] and the scale of each row [rows, 1].

    `lead` are the leading sizes of its products. `columns` are the channels that stand in `floats`
    [rows, columns] as they were.
    """

    values: str
    scale: str
    lead: str
    columns: npt.NDArray[np.int64]
    floats: str


class _PerToken:
    """Puts products into their per-token int8 form."""

    def __init__(self, graph: Graph, limit: int) -> None:
        self._graph = graph
        self._limit = limit
        self._stored: set[str] = set()
        constant = graph.constant
        self._last_axis = constant("last_axis", np.array([-1], np.int64))
        self._steps = constant("rows_127", np.array(127, np.float32))
        self._min_scale = constant("rows_least", np.array(1e-30, np.float32))  # for a row of zeros
        self._unit_scale = constant("rows_one", np.array(1, np.float32))
        self._zero_point = constant("rows_zero_point", np.array(128, np.uint8))

    def quantize(self, products: Sequence[Product], statistics: Statistics | None) -> None:
        """Replace the products of one activation."""
        nodes: list[NodeProto] = []
        rows = self._rows(products[0].activation, nodes, statistics)
        for product in products:
            self._product(product, rows, nodes, statistics)
            self._graph.replace(product.node, nodes)
            nodes = []

    def _rows(self, x: str, nodes: list[NodeProto], statistics: Statistics | None) -> _Rows:
        name = f"{x}_rows"
        columns = np.empty(0, np.int64) if statistics is None else _outliers(statistics.peaks)
        flat = add_node(nodes, "Flatten", [x], f"{name}_flat", axis=-1)
        inner, floats = flat, ""
        if statistics is not None and len(columns):
            # Their int8 weights are zero: what is saturated there counts for nothing.
            inlier_mask = ~np.isin(np.arange(len(statistics.peaks)), columns)
            mask = self._graph.constant(f"{name}_inside", inlier_mask.astype(np.float32))
            inner = add_node(nodes, "Mul", [flat, mask], f"{name}_inner")
            outliers = self._graph.constant(f"{name}_places", columns)
            floats = add_node(nodes, "Gather", [flat, outliers], f"{name}_floats", axis=-1)
        # The greatest magnitude from both ends: magnitudes of all would be written and read again.
        high, low = (self._reduce(end, inner, f"{name}_{end}", nodes) for end in ("Max", "Min"))
        low = add_node(nodes, "Neg", [low], f"{name}_below")
        high = add_node(nodes, "Max", [high, low], f"{name}_most")
        scale = add_node(nodes, "Div", [high, self._steps], f"{name}_step")
        scale = add_node(nodes, "Max", [scale, self._min_scale], f"{name}_scale")
        count = add_node(nodes, "Shape", [scale], f"{name}_count")
        uint8 = numpy_helper.from_array(np.array([128], np.uint8))
        zeros = add_node(nodes, "ConstantOfShape", [count], f"{name}_zeros", value=uint8)
        value = add_node(nodes, "QuantizeLinear", [flat, scale, zeros], name, axis=0)
        column = add_node(nodes, "Unsqueeze", [scale, self._last_axis], f"{name}_scales")
        size = add_node(nodes, "Shape", [x], f"{name}_size", end=-1)
        lead = add_node(nodes, "Concat", [size, self._last_axis], f"{name}_lead", axis=0)
        return _Rows(value, column, lead, columns, floats)

    def _reduce(self, extreme: str, x: str, name: str, nodes: list[NodeProto]) -> str:
        if self._graph.opset < 18:
            return add_node(nodes, f"Reduce{extreme}", [x], name, axes=[-1], keepdims=0)
        return add_node(nodes, f"Reduce{extreme}", [x, self._last_axis], name, keepdims=0)

    def _product(
        self, product: Product, rows: _Rows, nodes: list[NodeProto], statistics: Statistics | None
    ) -> None:
        output, name = product.output, product.weight
        while name in self._stored:  # by another activation, whose columns are others
            name += "_again"
        self._stored.add(name)
        self._store(product, name, rows.columns, statistics)
        # With a row scale of one this is a product whose sums are brought to their channels'
        # scales before they leave the cache; the operator knows no scale for each row.
        value = add_node(
            nodes,
            "MatMulIntegerToFloat",
            [rows.values, name + _INT8, self._unit_scale, name + _SCALE, self._zero_point],
            f"{output}_sums",
            domain=MICROSOFT,
        )
        value = add_node(nodes, "Mul", [value, rows.scale], f"{output}_scaled")
        added = product.bias
        if len(rows.columns):
            inputs = [rows.floats, name + _COLUMNS, *([added] if added else [])]
            added = add_node(nodes, "Gemm", inputs, f"{output}_floats")
        if added:
            value = add_node(nodes, "Add", [value, added], f"{output}_flat")
        add_node(nodes, "Reshape", [value, rows.lead], output)

    def _store(
        self,
        product: Product,
        name: str,
        columns: npt.NDArray[np.int64],
        statistics: Statistics | None,
    ) -> None:
        weight = self._graph.matrix(product)
        inlier_mask = np.ones(len(weight), dtype=bool)
        inlier_mask[columns] = False
        inner = np.ascontiguousarray((weight * inlier_mask[:, None]).T)
        scales = row_scales(inner, self._limit)
        if statistics is not None and statistics.sufficient:
            correlation = statistics.correlation * np.outer(inlier_mask, inlier_mask)
            channels = round_together(inner, scales, -self._limit, self._limit, correlation)
            channels[:, ~inlier_mask] = 0
        else:
            channels = round_alone(inner, scales, -self._limit, self._limit)
        self._graph.constant(name + _INT8, channels.T)
        self._graph.constant(name + _SCALE, scales[:, 0])
        if len(columns):
            self._graph.constant(name + _COLUMNS, weight[columns])


def _input_size(graph: Graph, product: Product) -> int:
    shape = graph.shape(product.weight)
    assert shape is not None  # it is a matrix
    return shape[1] if product.flipped else shape[0]


def _outliers(peaks: Array) -> npt.NDArray[np.int64]:
    """The channels that reach far higher than most, in order."""
    highest = np.argsort(-peaks, kind="stable")[:_FLOAT_COLUMNS]
    return np.sort(highest[peaks[highest] > _OUTLIER * np.median(peaks)])
