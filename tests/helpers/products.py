"""ONNX graphs of single products, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]


def graph(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, npt.NDArray[np.generic]],
    outputs: Sequence[str] = ("y",),
    *,
    rank: int = 3,
    opset: int = 17,
) -> ModelProto:
    """A model of activations x of this rank, or of ids x where it begins with a lookup."""
    lookup = nodes[0].op_type == "Gather"
    sizes = [f"size{axis}" for axis in range(rank)]
    results = [f"result{axis}" for axis in range(rank + lookup)]
    kind = TensorProto.INT64 if lookup else TensorProto.FLOAT
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "test",
            [helper.make_tensor_value_info("x", kind, sizes)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, results) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def run(model: ModelProto, x: npt.NDArray[np.generic]) -> list[Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    results: list[Array] = session.run(None, {"x": x})
    return results


def product(weight: Array, opset: int = 17) -> ModelProto:
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, opset=opset)


def constants(model: ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def error(result: Array, wanted: Array) -> float:
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))
