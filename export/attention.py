"""Attention whose sums do not depend on where in a pack a token stands."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_LAST = "last_axis"


def sum_softmax_in_double(model: ModelProto) -> ModelProto:
    """Sum the exponentials of every softmax in float64, and divide by that; in place.

    Vector units sum a row in lanes, so a float32 softmax is rounded by where its tokens stand among
    those that they do not see; int8 turns such a last bit into a whole step of an activation. The
    float64 sum of float32 exponentials, rounded to float32, is the same in any order, and so is the
    product with the values, which goes along the row and adds zeros for what is not seen. Where
    that product comes next, the division waits for it: it has fewer elements.

    Raises:
        ValueError: the graph has no softmax over its last axis.
    """
    graph = model.graph
    _drop_casts(graph)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    waiting: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        name = node.output[0]
        undivided = f"{name}_undivided"
        if node.op_type == "Softmax" and _over_last_axis(node):
            if _multiplied(node, users):
                nodes += _exponentials(node.input[0], name, opset)
                waiting[name] = f"{name}_sum"
            else:
                nodes += _exponentials(node.input[0], undivided, opset)
                nodes.append(helper.make_node("Div", [undivided, f"{undivided}_sum"], [name]))
        elif node.op_type == "MatMul" and node.input[0] in waiting:
            node.output[0] = undivided
            nodes += [node, helper.make_node("Div", [undivided, waiting[node.input[0]]], [name])]
        else:
            nodes.append(node)
    if len(nodes) == len(graph.node):
        raise ValueError("the graph has no attention to rewrite")
    graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), _LAST))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def _drop_casts(graph: GraphProto) -> None:
    """Leave out casts of softmaxes to float32: in a float32 graph they change nothing."""
    same: dict[str, str] = {}
    softmaxes = {node.output[0] for node in graph.node if node.op_type == "Softmax"}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
        to = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        if node.op_type == "Cast" and node.input[0] in softmaxes and to == [TensorProto.FLOAT]:
            same[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _over_last_axis(softmax: NodeProto) -> bool:
    return [a.i for a in softmax.attribute if a.name == "axis"] in ([], [-1])


def _multiplied(softmax: NodeProto, users: dict[str, list[NodeProto]]) -> bool:
    """Whether a softmax is used for one thing: the product with the values."""
    following = users.get(softmax.output[0], [])
    return (
        len(following) == 1
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
