"""Attention whose sums do not depend on where in a pack a token stands."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from export.graph.nodes import Graph, add_node, attributes

_EXPONENT_FLOOR = -80.0
"""Floor under what goes into Exp, where every masked score lies. With AMX, ONNX Runtime's Exp is 15
times slower where it underflows. exp(-80) is 2e-35: it changes no sum that has exp(0) in it."""


def sum_softmax_in_double(graph: Graph) -> None:
    """Sum the exponentials of every softmax in float64, and divide by that.

    Vector units sum a row in lanes, so a float32 softmax is rounded by where its tokens stand among
    those that they do not see; int8 turns such a last bit into a whole step of an activation. The
    float64 sum of float32 exponentials, rounded to float32, is the same in any order, and so is the
    product with the values, which goes along the row and adds at most 2e-35 times each value that
    is not seen. Where that product comes next, the division waits for it: it has fewer elements. (A
    column of ones among the values would give the sum with that product, and faster; but a product
    so widened is cut into other panels, and its sums then depend on the place.)

    Raises:
        ValueError: the graph has no softmax over its last axis.
    """
    last_axis = graph.constant("last_axis", np.array([-1], np.int64))
    floor = graph.constant("least_exponent", np.array(_EXPONENT_FLOOR, np.float32))
    has_softmax = False
    for node in graph.nodes:
        if node.op_type != "Softmax" or attributes(node).get("axis", -1) != -1:
            continue
        has_softmax = True
        name = node.output[0]
        product = _product(graph, node)
        exponentials = name if product is not None else f"{name}_undivided"
        nodes = _exponentials(graph, node.input[0], exponentials, (last_axis, floor))
        wide = add_node(nodes, "Cast", [exponentials], f"{name}_wide", to=TensorProto.DOUBLE)
        total = add_node(nodes, "ReduceSum", [wide, last_axis], f"{name}_total", keepdims=1)
        total = add_node(nodes, "Cast", [total], f"{name}_sum", to=TensorProto.FLOAT)
        if product is None:
            add_node(nodes, "Div", [exponentials, total], name)
        else:
            output = product.output[0]
            divided: list[NodeProto] = []
            value = add_node(divided, "MatMul", [name, product.input[1]], f"{output}_undivided")
            add_node(divided, "Div", [value, total], output)
            graph.replace(product, divided)
        graph.replace(node, nodes)
    if not has_softmax:
        raise ValueError("the graph has no attention to rewrite")
    graph.apply()


def _product(graph: Graph, softmax: NodeProto) -> NodeProto | None:
    """The product with the values, where a softmax is used for that alone.

    Casts to float32 between them change nothing in a float32 graph.
    """
    name = softmax.output[0]
    while graph.used_once(name):
        user = graph.users[name][0]
        if user.op_type == "Cast" and attributes(user)["to"] == TensorProto.FLOAT:
            name = user.output[0]
        elif user.op_type == "MatMul" and user.input[0] == name:
            return user
        else:
            return None
    return None


def _exponentials(
    graph: Graph, scores: str, name: str, constants: tuple[str, str]
) -> list[NodeProto]:
    """exp(scores - max) under `name`; the constants are the last axis and the least exponent."""
    last_axis, floor = constants
    nodes: list[NodeProto] = []
    if graph.opset < 18:
        peak = add_node(nodes, "ReduceMax", [scores], f"{name}_max", axes=[-1], keepdims=1)
    else:
        peak = add_node(nodes, "ReduceMax", [scores, last_axis], f"{name}_max", keepdims=1)
    below = add_node(nodes, "Sub", [scores, peak], f"{name}_below")
    above = add_node(nodes, "Max", [below, floor], f"{name}_above")
    add_node(nodes, "Exp", [above], name)
    return nodes
