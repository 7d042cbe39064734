"""Attention whose sums do not depend on where in a pack a token stands."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_LAST = "last_axis"


def sum_softmax_in_double(model: ModelProto) -> ModelProto:
    """Divide by the sum of the exponentials after the product with the values; in place.

    Vector units sum a row in lanes, so a float32 softmax is rounded by where its tokens stand among
    those that they do not see; int8 turns such a last bit into a whole step of an activation. The
    float64 sum of float32 exponentials, rounded to float32, is the same in any order, and so is the
    product with the values, which goes along the row and adds zeros for what is not seen.

    Raises:
        ValueError: the graph has no softmax over its last axis that is multiplied with values.
    """
    graph = model.graph
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    sums: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        name = node.output[0]
        if node.op_type == "Softmax" and _multiplied(node, users):
            nodes += _exponentials(node.input[0], name, opset)
            sums[name] = f"{name}_sum"
        elif node.op_type == "MatMul" and node.input[0] in sums:
            node.output[0] = f"{name}_undivided"
            nodes += [node, helper.make_node("Div", [node.output[0], sums[node.input[0]]], [name])]
        else:
            nodes.append(node)
    if not sums:
        raise ValueError("the graph has no attention to rewrite")
    graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), _LAST))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def _multiplied(softmax: NodeProto, users: dict[str, list[NodeProto]]) -> bool:
    """Whether a softmax over the last axis is used for one thing: the product with the values."""
    axes = [attribute.i for attribute in softmax.attribute if attribute.name == "axis"]
    following = users.get(softmax.output[0], [])
    return (
        axes in ([], [-1])
        and len(following) == 1
        and following[0].op_type == "MatMul"
        and following[0].input[0] == softmax.output[0]
    )


def _exponentials(scores: str, name: str, opset: int) -> list[NodeProto]:
    """exp(scores - max) under `name`, and its sum [..., 1] under `name`_sum."""
    highest, below, wide, total = (f"{name}_{n}" for n in ("max", "below", "wide", "total"))
    if opset < 18:
        peak = helper.make_node("ReduceMax", [scores], [highest], axes=[-1], keepdims=1)
    else:
        peak = helper.make_node("ReduceMax", [scores, _LAST], [highest], keepdims=1)
    return [
        peak,
        helper.make_node("Sub", [scores, highest], [below]),
        helper.make_node("Exp", [below], [name]),
        helper.make_node("Cast", [name], [wide], to=TensorProto.DOUBLE),
        helper.make_node("ReduceSum", [wide, _LAST], [total], keepdims=1),
        helper.make_node("Cast", [total], [f"{name}_sum"], to=TensorProto.FLOAT),
    ]
