"""What a traced graph says of its shapes: what is known of them becomes constant."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from export.graph.nodes import Graph

Shape = tuple[int | str, ...]
"""Of a value: sizes, or the names of sizes that differ from run to run."""
BY_ELEMENT = frozenset(
    "Abs Add And Cast Clip Cos Div Elu Equal Erf Exp Gelu Greater HardSigmoid Identity IsNaN "
    "LeakyRelu Less LessOrEqual Log Max Min Mul Neg Not Or Pow Reciprocal Relu Sigmoid Sin "
    "Softplus Sqrt Sub Tanh Where".split()
)
"""Operators that take their inputs element by element, broadcast to each other."""
TARGET = "_target"
"""Ends the name of a constant that says what Reshape or Expand makes."""


def infer_shapes(graph: Graph) -> Mapping[str, Shape]:
    """The shapes of a graph's values, by name, as far as ONNX Runtime's tool knows them.

    Takes standard operators only. Sizes that are equal have the same name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        model = SymbolicShapeInference.infer_shapes(graph.copy(), auto_merge=True)
    value_infos = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    shapes: dict[str, Shape] = {}
    for value in value_infos:
        if value.type.tensor_type.HasField("shape"):
            sizes = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(size.dim_param or size.dim_value for size in sizes)
    return shapes


def settle_shapes(graph: Graph) -> None:
    """Make the targets of Reshape and Expand constants, if at most one size is open.

    Known sizes become constants too.

    They stood at the end of chains that took the sizes of values apart and put them together.
    """
    shapes = infer_shapes(graph)
    replacements: dict[str, str] = {}
    for node in graph.nodes:
        for number, name in enumerate(node.input):
            node.input[number] = replacements.get(name, name)
        target = _target(node, shapes)
        size = _size(graph, node, shapes)
        if node.op_type == "Slice" and _takes_all(graph, node, shapes):
            replacements[node.output[0]] = node.input[0]
        elif target is not None:
            name = graph.constant(f"{node.output[0]}{TARGET}", np.array(target, np.int64))
            node.input[1] = name
        elif size is not None:
            name = f"{'sizes' if size.ndim else 'size'}_{size.item()}"
            replacements[node.output[0]] = graph.constant(name, size)
    graph.apply()


def _takes_all(graph: Graph, node: NodeProto, shapes: Mapping[str, Shape]) -> bool:
    """Whether a slice is as large as what it is of, and not turned round."""
    before, after = (shapes.get(name) for name in (node.input[0], node.output[0]))
    step = graph.integer(node.input[4]) if len(node.input) > 4 else 1
    return before is not None and before == after and step == 1


def _size(
    graph: Graph, node: NodeProto, shapes: Mapping[str, Shape]
) -> npt.NDArray[np.int64] | None:
    """The one size that a node takes out of the shape of a value, where it is known."""
    source = graph.producers.get(node.input[0]) if node.op_type == "Gather" else None
    output_shape = shapes.get(node.output[0])
    if source is None or source.op_type != "Shape" or output_shape not in ((), (1,)):
        return None
    axis, shape = graph.integer(node.input[1]), shapes.get(source.input[0])
    size = None if axis is None or shape is None else shape[axis]
    return np.full(output_shape, size, np.int64) if isinstance(size, int) else None


def _target(node: NodeProto, shapes: Mapping[str, Shape]) -> list[int] | None:
    if node.op_type not in ("Reshape", "Expand") or node.output[0] not in shapes:
        return None
    after, before = shapes[node.output[0]], shapes.get(node.input[0])
    if node.op_type == "Reshape":
        return open_target(after)
    if before is None:
        return None
    padded = (1,) * (len(after) - len(before)) + before
    # A size of one leaves what is there as it is.
    target = [1 if size == was else size for size, was in zip(after, padded, strict=True)]
    sizes = [size for size in target if isinstance(size, int)]
    return sizes if len(sizes) == len(target) else None


def open_target(shape: Shape) -> list[int] | None:
    """A shape as Reshape takes it, -1 for the one size that is open; None where several are."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if sizes.count(-1) <= 1 else None
