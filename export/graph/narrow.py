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
_ALONG = frozenset(
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
    places: dict[str, list[tuple[NodeProto, int]]] = {}  # value -> nodes that need only rows of it
    for node in gatherings:
        rows[node.input[0]] = attributes(node).get("axis", 0)
        places.setdefault(node.input[0], []).append((node, 0))
    inside: set[str] = set()
    for node in reversed(graph.nodes):
        outputs = [output for output in node.output if output in graph.users]
        along = {rows.get(output) for output in outputs}
        if any(len(places.get(output, ())) < len(graph.users[output]) for output in outputs):
            continue
        (axis,) = along if len(along) == 1 else (None,)
        axes = None if axis is None else _input_axes(graph, node, axis, shapes)
        read = [(n, v, axes[n]) for n, v in enumerate(node.input)] if axes else []
        if not axes or any(a is not None and rows.get(v, a) != a for _, v, a in read):
            continue
        inside.update(outputs)
        for number, value, own in read:
            if own is not None:
                rows[value] = own
                places.setdefault(value, []).append((node, number))
    for node in gatherings:
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]
    _put(graph, {v: p for v, p in places.items() if v not in inside}, rows)
    graph.apply()


def _put(
    graph: Graph,
    places: Mapping[str, Sequence[tuple[NodeProto, int]]],
    rows: Mapping[str, int],
) -> None:
    """Gather the rows of these values before the first node that needs no more of them."""
    order = {node.output[0]: place for place, node in enumerate(graph.nodes)}
    before: dict[str, list[NodeProto]] = {}
    for value, needing in places.items():
        name = f"{value}_read"
        while name in graph.producers:  # by an earlier time
            name += "_again"
        for node, number in needing:
            node.input[number] = name
        first = min((node.output[0] for node, _ in needing), key=order.__getitem__)
        gathered = before.setdefault(first, [])
        add_node(gathered, "Gather", [value, _READS], name, axis=rows[value])
    for output, nodes in before.items():
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
    given = [shape for shape in inputs if shape is not None]
    from_end = len(output) - axis
    if kind in BY_ELEMENT:
        return [
            len(shape) - from_end if len(shape) >= from_end and shape[-from_end] != 1 else None
            for shape in given
        ]
    if kind in _ALONG:
        return _along(graph, node, axis, given)
    if kind in ("MatMul", "Gemm"):
        return _product(node, from_end, given)
    if kind == "Transpose":
        return [attributes(node)["perm"][axis]]
    if kind == "Unsqueeze":
        place = graph.integer(node.input[1])
        if place is None:
            return None
        place %= len(output)
        return None if place == axis else [axis - (place < axis), None]
    if kind == "Gather" and given[1] == ():
        place = attributes(node).get("axis", 0) % len(given[0])
        return [axis + (place <= axis), None]
    if kind in ("Reshape", "Expand") and node.input[1].endswith(TARGET):
        return _reshaped(kind, axis, given[0], output)
    return None


def _along(graph: Graph, node: NodeProto, axis: int, given: Sequence[Shape]) -> Axes | None:
    options = attributes(node)
    if "axis" in options or "axes" in options:
        along = options.get("axis", options.get("axes"))
        along = along[0] if isinstance(along, Sequence) and len(along) == 1 else along
    elif node.op_type in ("Slice", "ReduceSum", "ReduceMax", "ReduceMean"):
        at = 3 if node.op_type == "Slice" else 1
        along = graph.integer(node.input[at]) if len(node.input) > at else None
    else:
        along = -1
    if not isinstance(along, int) or not options.get("keepdims", 1):
        return None
    if along % len(given[0]) == axis or (node.op_type == "LayerNormalization" and along != -1):
        return None
    if node.op_type == "Concat":
        return [axis] * len(given)
    return [axis] + [None] * (len(given) - 1)


def _product(node: NodeProto, from_end: int, given: Sequence[Shape]) -> Axes | None:
    first, second = given[:2]
    if from_end < 2 or attributes(node).get("transA", 0):
        return None
    if from_end > 2 and len(second) > 2:  # one of several products at once
        return None
    added = [0 if len(shape) == 2 and shape[0] != 1 else None for shape in given[2:]]
    return [len(first) - from_end, None, *added]


def _reshaped(kind: str, axis: int, before: Shape, after: Shape) -> Axes | None:
    """Rows stay rows where as much stands before them as did."""
    if kind == "Expand":
        own = axis - (len(after) - len(before))
        return [own, None] if own >= 0 and before[own] == after[axis] else None
    leading = [size for size in after[:axis] if size != 1]
    for own, size in enumerate(before):
        if size == after[axis] and [s for s in before[:own] if s != 1] == leading:
            return [own, None]
    return None
