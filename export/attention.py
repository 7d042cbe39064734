"""Attention whose sums do not depend on where in a pack a token stands."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, shape_inference

from export.graph import Graph, add_node, attributes


def sum_softmax_in_order(graph: Graph) -> None:
    """Let every softmax of attention be summed by the product that comes after it.

    Vector units sum a row in lanes, so a float32 softmax is rounded by where its tokens stand among
    those that they do not see; int8 turns such a last bit into a whole step of an activation. The
    product with the values goes along the row, and adds zeros for what is not seen. So the values
    get a column of ones: what comes out in its place is the sum of the exponentials, by which the
    other columns are divided then. A softmax that no product follows sums its exponentials in
    float64 and rounds that to float32, which is the same in any order.

    Raises:
        ValueError: the graph has no softmax over its last axis.
    """
    ranks = _ranks(graph)
    constant = graph.constant
    last = constant("last_axis", np.array([-1], np.int64))
    found = False
    for node in graph.nodes:
        if node.op_type != "Softmax" or attributes(node).get("axis", -1) != -1:
            continue
        found = True
        name = node.output[0]
        nodes = _exponentials(graph, node.input[0], name, last)
        product = _product(graph, node)
        if product is None:
            nodes[-1].output[0] = f"{name}_exp"
            wide = add_node(nodes, "Cast", [f"{name}_exp"], f"{name}_wide", to=TensorProto.DOUBLE)
            total = add_node(nodes, "ReduceSum", [wide, last], f"{name}_total", keepdims=1)
            total = add_node(nodes, "Cast", [total], f"{name}_sum", to=TensorProto.FLOAT)
            add_node(nodes, "Div", [f"{name}_exp", total], name)
            graph.replace(node, nodes)
            continue
        graph.replace(node, nodes)
        values, output = product.input[1], product.output[0]
        rank = ranks[values]
        pads = constant(f"pads_{rank}", np.array([0] * (2 * rank - 1) + [1], np.int64))
        one = constant("pads_one", np.array(1, np.float32))
        nodes = []
        wider = add_node(nodes, "Pad", [values, pads, one], f"{output}_values")
        both = add_node(nodes, "MatMul", [name, wider], f"{output}_both")
        start = constant("slice_start", np.array([0], np.int64))
        end = constant("slice_end", np.array([np.iinfo(np.int64).max], np.int64))
        total = add_node(nodes, "Slice", [both, last, end, last], f"{output}_sum")
        sums = add_node(nodes, "Slice", [both, start, last, last], f"{output}_sums")
        add_node(nodes, "Div", [sums, total], output)
        graph.replace(product, nodes)
    if not found:
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


def _exponentials(graph: Graph, scores: str, name: str, last: str) -> list[NodeProto]:
    """exp(scores - max) under `name`."""
    nodes: list[NodeProto] = []
    if graph.opset < 18:
        peak = add_node(nodes, "ReduceMax", [scores], f"{name}_max", axes=[-1], keepdims=1)
    else:
        peak = add_node(nodes, "ReduceMax", [scores, last], f"{name}_max", keepdims=1)
    below = add_node(nodes, "Sub", [scores, peak], f"{name}_below")
    add_node(nodes, "Exp", [below], name)
    return nodes


def _ranks(graph: Graph) -> dict[str, int]:
    """How many axes each value has, as far as that follows from the graph."""
    inferred = shape_inference.infer_shapes(graph.model).graph
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in inferred.value_info
        if value.type.tensor_type.HasField("shape")
    }
