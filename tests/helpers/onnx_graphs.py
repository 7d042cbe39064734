"""Graphs with something in every place where a request may stand, and what `onnx` reads there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import helper, numpy_helper

from ercbatch.bundle.onnx_file import ExternalData, OnnxRequests

WEIGHTS = "model.onnx.data"
FLOAT = onnx.TensorProto.FLOAT


def external(location: str | None = WEIGHTS, **entries: str) -> onnx.TensorProto:
    """Four floats in another file."""
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=FLOAT, data_location="EXTERNAL")
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(values: onnx.TensorProto) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(4))
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[9])


def graph_of(*nodes: onnx.NodeProto, **parts: Any) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, FLOAT, [4]) for name in "xy"]
    return helper.make_graph([*nodes], "graph", values[:1], values[1:], **parts)


def model_of(graph: onnx.GraphProto, *imports: str, **parts: Any) -> onnx.ModelProto:
    opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in ("", *imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **parts)


def node(domain: str | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Gelu", ["x"], ["y"], domain=domain, **attributes)


def choice(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph_of(node()))


def constant(value: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["k"], value=value)


def function(domain: str, *nodes: onnx.NodeProto, imports: str = "") -> onnx.FunctionProto:
    opsets = [helper.make_opsetid(imports, 17)]
    return helper.make_function(domain, "twice", ["x"], ["y"], list(nodes), opsets)


def default_graph(graph: onnx.GraphProto) -> onnx.FunctionProto:
    """A function whose attribute has a graph for its default."""
    made = function("com.microsoft", node())
    made.attribute_proto.append(helper.make_attribute("body", graph))
    return made


def everything() -> onnx.ModelProto:
    """A model with something in every place that is looked at."""
    nodes = [
        choice(graph_of(choice(graph_of(node("com.microsoft"), constant(external(offset="16")))))),
        helper.make_node("Where", [], ["m"], graphs=[graph_of(node("ai.onnx"))]),
        helper.make_node("Concat", [], ["n"], tensors=[external(length="4")]),
        helper.make_node("Tile", [], ["o"], sparse_value=sparse(external(offset="1"))),
    ]
    nodes[-1].attribute.append(helper.make_attribute("more", [sparse(external(offset="2"))]))
    graph = graph_of(
        *nodes,
        initializer=[external(offset="0", length="16", checksum="0" * 40)],
        sparse_initializer=[sparse(external(offset="3"))],
    )
    model = model_of(
        graph,
        "com.microsoft",
        functions=[
            function("com.microsoft", node("ai.onnx"), constant(external(offset="5"))),
            default_graph(graph_of(node(), initializer=[external(offset="6")])),
        ],
    )
    model.training_info.add().algorithm.CopyFrom(graph_of(initializer=[external(offset="7")]))
    return model


def words(value: str | bytes) -> str:
    """A protobuf string: bytes where it is not UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def messages(message: Message) -> Iterator[Message]:
    """A message and all inside it, in whatever field."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def requests_of(model: onnx.ModelProto) -> OnnxRequests:
    """The same as `read_onnx`, from what the `onnx` package has read."""
    domains, operators, result = set(), set(), set()
    for message in messages(model):
        if isinstance(message, onnx.NodeProto):
            operators.add((words(message.domain), words(message.op_type)))
        if isinstance(message, onnx.NodeProto | onnx.OperatorSetIdProto | onnx.FunctionProto):
            if message.HasField("domain"):
                domains.add(words(message.domain))
        elif isinstance(message, onnx.TensorProto) and message.external_data:
            entries = {words(e.key): words(e.value) for e in message.external_data}
            length = entries.get("length")
            data = ExternalData(
                entries["location"],
                int(entries.get("offset", 0)),
                None if length is None else int(length),
            )
            result.add(data)
    return OnnxRequests(frozenset(domains), frozenset(operators), frozenset(result))
