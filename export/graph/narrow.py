"""What follows the last attention is computed only where an answer is read.

A graph ends by gathering the rows of its answers from those of all tokens. Rows don't meet outside
attention, so that gathering can be done earlier: it is moved towards the inputs through one node
after another, as far as it goes, which is to what enters the last layer and to the keys and values
of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from export.graph.nodes import Graph, add_node, attributes
from export.graph.shapes import BY_ELEMENT, TARGET, Shape, infer_shapes

Axes = list[int | None]
"""For each input of a node the axis on which it has the rows that its output has on one of its
axes; None for an input that every row takes whole."""

_READS = "reads"
_AXIS_OPERATORS = frozenset(
    "Concat LayerNormalization LogSoftmax ReduceMax ReduceMean ReduceSum ReduceSumSquare Slice "
    "Softmax Split".split()
)
"""Those that work along an axis, and keep the others as they are."""


def narrow(graph: Graph) -> None:
    """Move every gathering of the rows called `reads` as far up a graph as it goes.

    Reshapes must have their targets as constants (see `settle_shapes`).
    """
    shapes = infer_shapes(graph)
    gatherings = [n for n in graph.nodes if n.op_type == "Gather" and n.input[1] == _READS]
    rows: dict[str, int] = {}  # value -> the axis of its rows
    readers: dict[str, list[tuple[NodeProto, int]]] = {}  # value -> nodes that need only rows of it
    for node in gatherings:
        rows[node.input[0]] = attributes(node).get("axis", 0)
        readers.setdefault(node.input[0], []).append((node, 0))
    narrowed: set[str] = set()
    for node in reversed(graph.nodes):
        outputs = [output for output in node.output if output in graph.users]
        row_axes = {rows.get(output) for output in outputs}
        if any(len(readers.get(output, ())) < len(graph.users[output]) for output in outputs):
            continue
        (axis,) = row_axes if len(row_axes) == 1 else (None,)
        axes = None if axis is None else _input_axes(graph, node, axis, shapes)
        inputs = [(n, v, axes[n]) for n, v in enumerate(node.input)] if axes else []
        if not axes or any(a is not None and rows.get(v, a) != a for _, v, a in inputs):
            continue
        narrowed.update(outputs)
        for number, value, input_axis in inputs:
            if input_axis is not None:
                rows[value] = input_axis
                readers.setdefault(value, []).append((node, number))
    for node in gatherings:
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]
    _insert_gathers(graph, {v: p for v, p in readers.items() if v not in narrowed}, rows)
    graph.apply()


def _insert_gathers(
    graph: Graph,
    readers: Mapping[str, Sequence[tuple[NodeProto, int]]],
    rows: Mapping[str, int],
) -> None:
    """Gather the rows of these values before the first node that needs no more of them."""
    order = {node.output[0]: place for place, node in enumerate(graph.nodes)}
    gathers_before: dict[str, list[NodeProto]] = {}
    for value, uses in readers.items():
        name = f"{value}_read"
        while name in graph.producers:  # by an earlier time
            name += "_again"
        for node, number in uses:
            node.input[number] = name
        first = min((node.output[0] for node, _ in uses), key=order.__getitem__)
        gathers = gathers_before.setdefault(first, [])
        add_node(gathers, "Gather", [value, _READS], name, axis=rows[value])
    for output, nodes in gathers_before.items():
        node = graph.producers[output]
        graph.replace(node, [*nodes, node])


def _input_axes(
    graph: Graph, node: NodeProto, axis: int, shapes: Mapping[str, Shape]
) -> Axes | None:
    """See `Axes`; None where rows meet, or where it isn't known that they don't."""
    kind, output = node.op_type, shapes.get(node.output[0])
    inputs = [shapes.get(name, graph.shape(name)) if name else () for name in node.input]
    if (
        output is None
        or any(shape is None for shape in inputs)
        or not isinstance(output[axis], str)
    ):
        return None
    input_shapes = [shape for shape in inputs if shape is not None]
    from_end = len(output) - axis
    if kind in BY_ELEMENT:
        return [
            len(shape) - from_end if len(shape) >= from_end and shape[-from_end] != 1 else None
            for shape in input_shapes
        ]
    if kind in _AXIS_OPERATORS:
        return _axes_along(graph, node, axis, input_shapes)
    if kind in ("MatMul", "Gemm"):
        return _product_axes(node, from_end, input_shapes)
    if kind == "Transpose":
        return [attributes(node)["perm"][axis]]
    if kind == "Unsqueeze":
        changed_axis = graph.integer(node.input[1])
        if changed_axis is None:
            return None
        changed_axis %= len(output)
        return None if changed_axis == axis else [axis - (changed_axis < axis), None]
    if kind == "Gather" and input_shapes[1] == ():
        changed_axis = attributes(node).get("axis", 0) % len(input_shapes[0])
        return [axis + (changed_axis <= axis), None]
    if kind in ("Reshape", "Expand") and node.input[1].endswith(TARGET):
        return _reshape_axes(kind, axis, input_shapes[0], output)
    return None


def _axes_along(
    graph: Graph, node: NodeProto, axis: int, input_shapes: Sequence[Shape]
) -> Axes | None:
    options = attributes(node)
    if "axis" in options or "axes" in options:
        operator_axis = options.get("axis", options.get("axes"))
        operator_axis = (
            operator_axis[0]
            if isinstance(operator_axis, Sequence) and len(operator_axis) == 1
            else operator_axis
        )
    elif node.op_type in ("Slice", "ReduceSum", "ReduceMax", "ReduceMean"):
        axis_input = 3 if node.op_type == "Slice" else 1
        operator_axis = (
            graph.integer(node.input[axis_input]) if len(node.input) > axis_input else None
        )
    else:
        operator_axis = -1
    if not isinstance(operator_axis, int) or not options.get("keepdims", 1):
        return None
    if operator_axis % len(input_shapes[0]) == axis or (
        node.op_type == "LayerNormalization" and operator_axis != -1
    ):
        return None
    if node.op_type == "Concat":
        return [axis] * len(input_shapes)
    return [axis] + [None] * (len(input_shapes) - 1)


def _product_axes(node: NodeProto, from_end: int, input_shapes: Sequence[Shape]) -> Axes | None:
    first, second = input_shapes[:2]
    if from_end < 2 or attributes(node).get("transA", 0):
        return None
    if from_end > 2 and len(second) > 2:  # one of several products at once
        return None
    bias_axes = [0 if len(shape) == 2 and shape[0] != 1 else None for shape in input_shapes[2:]]
    return [len(first) - from_end, None, *bias_axes]


def _reshape_axes(kind: str, axis: int, before: Shape, after: Shape) -> Axes | None:
    """Rows stay rows where as much stands before them as did."""
    if kind == "Expand":
        before_axis = axis - (len(after) - len(before))
        return (
            [before_axis, None] if before_axis >= 0 and before[before_axis] == after[axis] else None
        )
    leading = [size for size in after[:axis] if size != 1]
    for before_axis, size in enumerate(before):
        if size == after[axis] and [s for s in before[:before_axis] if s != 1] == leading:
            return [before_axis, None]
    return None
