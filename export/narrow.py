"""What follows the last attention is computed only where an answer is read.

A graph ends by gathering the rows of its answers from those of all tokens. Rows don't meet outside
attention, so that gathering can be done earlier: it is moved towards the inputs through one node
after another, as far as it goes, which is to what enters the last layer and to the keys and values
of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from export.graph import Graph, add_node, attributes
from export.shapes import TARGET, Shape, infer_shapes

Axes = list[int | None]
"""For each input of a node the axis on which it has the rows that its output has on one of its
axes; None for an input that every row takes whole."""

_BY_ELEMENT = frozenset(
    "Abs Add And Cast Clip Cos Div Elu Equal Erf Exp Gelu Greater HardSigmoid Identity IsNaN "
    "LeakyRelu Less LessOrEqual Log Max Min Mul Neg Not Or Pow Reciprocal Relu Sigmoid Sin "
    "Softplus Sqrt Sub Tanh Where".split()
)
"""Operators that take their inputs element by element, broadcast to each other."""
_ALONG = frozenset(
    "Concat LayerNormalization LogSoftmax ReduceMax ReduceMean ReduceSum ReduceSumSquare Slice "
    "Softmax Split".split()
)
"""Those that work along an axis, and keep the others as they are."""


def narrow(graph: Graph) -> None:
    """Move the gathering at the end of a graph, the rows called `reads`, as far up as it goes.

    Reshapes must have their targets as constants (see `settle_shapes`).

    Raises:
        ValueError: the graph does not end so.
    """
    shapes = infer_shapes(graph)
    last = graph.nodes[-1]
    if last.op_type != "Gather" or attributes(last).get("axis", 0) != 0:
        raise ValueError("the graph does not end with the rows of its answers")
    data, reads = last.input
    rows = {data: 0}  # value -> the axis of its rows
    places = {data: [(last, 0)]}  # value -> (node, number of the input) where only rows are needed
    inside: set[str] = set()
    for node in reversed(graph.nodes[:-1]):
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
    if data not in inside:
        return
    _put(graph, {v: p for v, p in places.items() if v not in inside}, rows, reads)
    copied: list[NodeProto] = []
    add_node(copied, "Identity", [data], last.output[0])
    graph.replace(last, copied)
    graph.apply()


def _put(
    graph: Graph,
    places: Mapping[str, Sequence[tuple[NodeProto, int]]],
    rows: Mapping[str, int],
    reads: str,
) -> None:
    """Gather the rows of these values before the first node that needs no more of them."""
    before: dict[str, list[NodeProto]] = {}
    first: dict[str, NodeProto] = {}
    for value, needing in places.items():
        for node, number in needing:
            node.input[number] = f"{value}_read"
        node = needing[-1][0]  # they were found from the last node to the first
        first[node.output[0]] = node
        gathered = before.setdefault(node.output[0], [])
        add_node(gathered, "Gather", [value, reads], f"{value}_read", axis=rows[value])
    for output, node in first.items():
        graph.replace(node, [*before[output], node])


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
    if kind in _BY_ELEMENT:
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
