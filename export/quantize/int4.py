"""Weights of an ONNX graph to 4 bits in blocks of 32: ONNX Runtime's `MatMulNBits`.

Activations are brought to 8 bits inside the operator, each block of each row by itself, so no
neighbour moves your label here either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from export.graph.nodes import MICROSOFT, Array, Graph, Product, add_node
from export.quantize.int8 import sample_products
from export.quantize.rounding import block_scales, round_alone, round_together
from export.quantize.statistics import Sampler, Statistics

BLOCK = 32
"""Weights of an output channel that share a scale."""
_LOW, _HIGH = -8, 7
_INT8_ACTIVATIONS = 4
"""`accuracy_level` of the operator: activations as int8."""
_INT4, _SCALES = "_int4", "_int4_scales"


def quantize_products_to_4_bits(graph: Graph, *, sampler: Sampler | None = None) -> None:
    """Quantize every product of a graph with a constant float matrix.

    Args:
        graph: see `Graph`; its constants are called after the weights.
        sampler: what weights are multiplied with; it guides their rounding.
    """
    for products, statistics in sample_products(graph, sampler):
        for product in products:
            _quantize(graph, product, statistics)
    graph.apply()


def _quantize(graph: Graph, product: Product, statistics: Statistics | None) -> None:
    weight = np.ascontiguousarray(graph.matrix(product).T)
    packed, scales = pack_blocks(weight, statistics)
    inputs = [
        product.activation,
        graph.constant(product.weight + _INT4, packed),
        graph.constant(product.weight + _SCALES, scales),
        *(["", "", product.bias] if product.bias else []),
    ]
    nodes: list[NodeProto] = []
    add_node(
        nodes,
        "MatMulNBits",
        inputs,
        product.output,
        domain=MICROSOFT,
        K=weight.shape[1],
        N=weight.shape[0],
        bits=4,
        block_size=BLOCK,
        accuracy_level=_INT8_ACTIVATIONS,
    )
    graph.replace(product.node, nodes)


def pack_blocks(
    weight: Array, statistics: Statistics | None
) -> tuple[npt.NDArray[np.uint8], Array]:
    """(packed [outputs, blocks, 16], scales [outputs * blocks]) of weights [outputs, inputs].

    The lowest value is stored as 0, the operator's default. Two weights share a byte, the first in
    its lower half; the last block is filled up with zeros.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((outputs, blocks * BLOCK), np.float32)
    padded[:, :inputs] = weight
    scales = block_scales(padded, _LOW, BLOCK)
    values = np.zeros(padded.shape, np.int8)
    if statistics is not None and statistics.sufficient:
        steps = scales[:, :inputs]
        values[:, :inputs] = round_together(weight, steps, _LOW, _HIGH, statistics.correlation)
    else:
        values = round_alone(padded, scales, _LOW, _HIGH)
    nibbles = (values - _LOW).astype(np.uint8).reshape(outputs, blocks, BLOCK)
    packed = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).astype(np.uint8)
    return packed, scales[:, ::BLOCK].reshape(-1).astype(np.float32)
