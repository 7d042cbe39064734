"""Chains of a traced graph as the single operators that ONNX Runtime has for them.

ONNX Runtime fuses much by itself when it loads a graph: normalizations, activations, a scaled
product with a transposed matrix. Rotations it leaves. (Residuals it leaves too, but there its
SkipLayerNormalization is slower on a processor than the sum and the normalization apart.)
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from export.graph.nodes import MICROSOFT, Graph, add_node

_SLICE_END = np.iinfo(np.int64).max
"""Where the exporter ends a slice that has no end."""


def fuse_rotations(graph: Graph) -> None:
    """Fuse x * cos + rotate_half(x) * sin, the rotary position embedding (arXiv 2104.09864).

    Llama and most others have it. cos and sin [packs, length, size] repeat the same half twice.
    """
    tables: dict[tuple[str, str], list[str]] = {}
    for node in graph.nodes:
        rotation = _rotation(graph, node) if node.op_type == "Add" else None
        if rotation is None:
            continue
        x, cos, sin, half = rotation
        nodes: list[NodeProto] = []
        if (cos, sin) not in tables:
            tables[cos, sin] = _tables(graph, cos, sin, half, nodes)
        inputs = [x, *tables[cos, sin]]
        add_node(nodes, "RotaryEmbedding", inputs, node.output[0], domain=MICROSOFT)
        graph.replace(node, nodes)
    graph.apply()


def _rotation(graph: Graph, node: NodeProto) -> tuple[str, str, str, str] | None:
    """(x, cos, sin, the name of half their size) of a sum that is a rotation."""
    cos_product, sin_product = (graph.producers.get(name) for name in node.input)
    if (
        cos_product is None
        or sin_product is None
        or not cos_product.op_type == sin_product.op_type == "Mul"
    ):
        return None
    x = cos_product.input[0]
    half = _match_rotate_half(graph, sin_product.input[0], x)
    cos, sin = (_unsqueezed(graph, factor.input[1]) for factor in (cos_product, sin_product))
    return None if half is None or cos is None or sin is None else (x, cos, sin, half)


def _match_rotate_half(graph: Graph, name: str, x: str) -> str | None:
    """The name of the half size, where a value is x with its second half negated and first."""
    concat = graph.producers.get(name)
    if concat is None or concat.op_type != "Concat" or len(concat.input) != 2:
        return None
    negated, first = (graph.producers.get(part) for part in concat.input)
    if negated is None or negated.op_type != "Neg" or first is None:
        return None
    second = graph.producers.get(negated.input[0])
    if second is None or not first.op_type == second.op_type == "Slice":
        return None
    if not first.input[0] == second.input[0] == x:
        return None
    steps = [
        graph.integer(piece.input[4]) if len(piece.input) > 4 else 1 for piece in (first, second)
    ]
    begins, middle, end = (
        graph.integer(first.input[1]),
        first.input[2],
        graph.integer(second.input[2]),
    )
    if (
        begins != 0
        or steps != [1, 1]
        or end != _SLICE_END
        or not graph.same(middle, second.input[1])
    ):
        return None
    return str(middle)


def _unsqueezed(graph: Graph, name: str) -> str | None:
    """What was unsqueezed to be broadcast over heads: [packs, length, size]."""
    node = graph.producers.get(name)
    if node is None or node.op_type != "Unsqueeze" or graph.integer(node.input[1]) != 1:
        return None
    return str(node.input[0])


def _tables(graph: Graph, cos: str, sin: str, half: str, nodes: list[NodeProto]) -> list[str]:
    """Names of position ids [packs, length] and of the tables [packs * length, half] they index.

    The operator takes them instead of cos and sin [packs, length, 2 * half].
    """
    constant = graph.constant
    last = constant("last_axis", np.array([-1], np.int64))
    start = constant("slice_start", np.array([0], np.int64))
    tables = []
    for name in (cos, sin):
        part = add_node(nodes, "Slice", [name, start, half, last], f"{name}_half")
        tables.append(add_node(nodes, "Flatten", [part], f"{name}_table", axis=2))
    shape = add_node(nodes, "Shape", [cos], f"{cos}_places_shape", end=2)
    count = add_node(nodes, "ReduceProd", [shape], f"{cos}_places_count", keepdims=0)
    zero = constant("integer_0", np.array(0, np.int64))
    one = constant("integer_1", np.array(1, np.int64))
    positions = add_node(nodes, "Range", [zero, count, one], f"{cos}_places_row")
    return [add_node(nodes, "Reshape", [positions, shape], f"{cos}_places"), *tables]
