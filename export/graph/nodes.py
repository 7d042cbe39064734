"""An ONNX graph under rewriting, and the weights that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ercbatch.bundle import manifest

Array = npt.NDArray[np.float32]

MICROSOFT = "com.microsoft"
"""ONNX Runtime's own operators."""
TRANSPOSED = "_transposed"
"""Ends the name of a weight that is stored as the product takes it, [inputs, outputs]."""
_EXTERNAL_BYTES = 1024
"""Bytes from which a constant goes into the data file, where there is one."""
_MAX_GRAPH_BYTES = 3 << 29
"""Bytes from which a model has such a file: protobuf ends at 2 GiB."""


@dataclass(frozen=True, slots=True)
class Product:
    """`output` = `activation` [..., k] x the matrix [k, n] called `weight` (+ `bias`).

    `flipped`: the constant of that name is [n, k].
    """

    node: NodeProto
    activation: str
    weight: str
    flipped: bool
    bias: str | None
    output: str


class Graph:
    """A graph whose nodes are replaced where they stand, and whose weights are read when needed.

    Args:
        model: opset 15 or later.
        weights: name -> tensor, of constants that the graph names without holding them.
        data: a file for large constants, each written there as soon as it is added: the whole
            model is never in memory. By default they are kept in the graph (2 GiB at most).
    """

    def __init__(
        self,
        model: ModelProto,
        weights: Mapping[str, torch.Tensor] | None = None,
        data: Path | None = None,
    ) -> None:
        self.model = model
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self._weights = weights or {}
        self._data = data
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._added: dict[str, TensorProto] = {}
        self._index()

    def _index(self) -> None:
        nodes = self.model.graph.node
        self._replacements: dict[str, list[NodeProto]] = {}
        self.producers = {name: node for node in nodes for name in node.output}
        self.users: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self._outputs = {output.name for output in self.model.graph.output}

    @property
    def nodes(self) -> Sequence[NodeProto]:
        """All nodes, in order."""
        nodes: Sequence[NodeProto] = self.model.graph.node
        return nodes

    def source(self, name: str) -> str:
        """The constant that a name stands for, where it is a copy; else the name itself."""
        node = self.producers.get(name)
        while node is not None and node.op_type == "Identity":
            name = node.input[0]
            node = self.producers.get(name)
        return name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant; None for what is none."""
        if name in self._weights:
            return tuple(self._weights[name].shape)
        tensor = self._constants.get(name, self._added.get(name))
        return None if tensor is None else tuple(tensor.dims)

    def value(self, name: str) -> Array:
        """A constant's value, in float32."""
        if name in self._weights:
            weight: Array = self._weights[name].detach().float().cpu().numpy()
            return weight
        return numpy_helper.to_array(self._constants[name])

    def is_matrix(self, name: str) -> bool:
        """Whether a name is a constant float matrix."""
        shape = self.shape(name)
        tensor = self._constants.get(name)
        floats = tensor is None or tensor.data_type == TensorProto.FLOAT
        return shape is not None and len(shape) == 2 and floats

    def matrix(self, product: Product) -> Array:
        """The matrix [k, n] of a product."""
        value = self.value(product.weight)
        return value.T if product.flipped else value

    def integer(self, name: str) -> int | None:
        """The value of a constant with one element; None for anything else."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Identity", "Unsqueeze"):
            name = node.input[0]
            node = self.producers.get(name)
        if node is not None and node.op_type == "Constant":
            value = numpy_helper.to_array(attributes(node)["value"])
        elif name in self._constants:
            value = numpy_helper.to_array(self._constants[name])
        else:
            return None
        return int(value.item()) if value.size == 1 else None

    def same(self, one: str, other: str) -> bool:
        """Whether two names are computed alike."""
        if one == other:
            return True
        a, b = self.producers.get(one), self.producers.get(other)
        return (
            a is not None
            and b is not None
            and a.op_type == b.op_type
            and attributes(a) == attributes(b)
            and len(a.input) == len(b.input)
            and all(map(self.same, a.input, b.input))
        )

    def products(self) -> list[Product]:
        """Every product with a constant float matrix: MatMul, and Gemm without scaling."""
        products = (self.product(node) for node in self.nodes)
        return [product for product in products if product is not None]

    def product(self, node: NodeProto) -> Product | None:
        """The node as a product with a constant float matrix, or None."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        options = attributes(node)
        if options.get("transA", 0) or any(options.get(n, 1.0) != 1.0 for n in ("alpha", "beta")):
            return None
        flipped = bool(options.get("transB", 0))
        weight = self.source(node.input[1])
        transposition = self.producers.get(weight)
        if transposition is not None and transposition.op_type == "Transpose":
            if list(attributes(transposition).get("perm", (1, 0))) != [1, 0]:
                return None
            weight, flipped = self.source(transposition.input[0]), not flipped
        if not self.is_matrix(weight):
            return None
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        return Product(node, node.input[0], weight, flipped, bias, node.output[0])

    def used_once(self, name: str) -> bool:
        """Whether one node reads a value, and nothing else does."""
        return len(self.users.get(name, ())) == 1 and name not in self._outputs

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """Add a constant; one that is there already stays as it is."""
        if name not in self._added:
            if self._data is None or value.nbytes < _EXTERNAL_BYTES:
                self._added[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
            else:
                self._added[name] = _write_constant(self._data, name, value)
        return name

    def replace(self, node: NodeProto, nodes: list[NodeProto]) -> None:
        """Put these nodes where that one stands."""
        self._replacements[node.output[0]] = nodes

    def apply(self) -> None:
        """Put the new nodes in, and drop those that nothing reads any more."""
        nodes: list[NodeProto] = []
        for node in self.nodes:
            nodes += self._replacements.get(node.output[0], [node])
        needed = set(self._outputs)
        live_nodes: list[NodeProto] = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                live_nodes.append(node)
                needed.update(node.input)
        del self.model.graph.node[:]
        self.model.graph.node.extend(reversed(live_nodes))
        domains = {opset.domain for opset in self.model.opset_import}
        if MICROSOFT not in domains and any(node.domain == MICROSOFT for node in live_nodes):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        self._index()

    def copy(self) -> ModelProto:
        """The graph as it is, for tools that look at it: what it names is an input or in it."""
        model = ModelProto()
        model.CopyFrom(self.model)
        model.graph.initializer.extend(
            tensor for tensor in self._added.values() if not tensor.external_data
        )
        return model

    def finish(self) -> ModelProto:
        """The graph with the constants that it reads, in the layout in which it reads them."""
        self.apply()
        graph = self.model.graph
        nodes = self._folded_nodes()
        del graph.node[:]
        graph.node.extend(nodes)
        self._index()
        for name in sorted(self._weights.keys() & self.users.keys()):
            self.constant(name, self.value(name))
        self._constants.update(self._added)
        del graph.initializer[:]
        graph.initializer.extend(t for name, t in self._constants.items() if name in self.users)
        inputs = [value for value in graph.input if value.name not in self._weights]
        del graph.input[:]
        graph.input.extend(inputs)
        del graph.value_info[:]
        self._weights = {}
        return self.model

    def _folded_nodes(self) -> list[NodeProto]:
        """The nodes, without copies and transpositions of constants."""
        names: dict[str, str] = {}
        nodes = []
        for node in self.nodes:
            for i, name in enumerate(node.input):
                node.input[i] = names.get(name, name)
            first = node.input[0] if node.input else ""
            if node.op_type == "Identity" and self.shape(first) is not None:
                names[node.output[0]] = first
            elif node.op_type == "Transpose" and self.shape(first) is not None:
                transposed = first + TRANSPOSED
                if transposed not in self._added:
                    self.constant(transposed, self.value(first).transpose(attributes(node)["perm"]))
                names[node.output[0]] = transposed
            else:
                nodes.append(node)
        return nodes

    def save(self, path: Path) -> None:
        """Write the graph; large constants are in its data file already.

        Raises:
            OSError: it cannot be written.
        """
        onnx.save(self.finish(), path)
        onnx.checker.check_model(str(path))


def _write_constant(path: Path, name: str, value: npt.NDArray[np.generic]) -> TensorProto:
    """A constant that is added to a data file, its bytes copied no more often than they must be."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor = TensorProto(
        name=name, dims=value.shape, data_type=kind, data_location=TensorProto.EXTERNAL
    )
    with path.open("ab") as file:
        location = {"location": path.name, "offset": file.tell(), "length": value.nbytes}
        np.ascontiguousarray(value).tofile(file)
    for key, entry in location.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def data_file(folder: Path, size: float) -> Path | None:
    """The file for the constants of a model of `size` bytes; None to keep them in the graph."""
    return folder / manifest.MODEL_DATA if size >= _MAX_GRAPH_BYTES else None


def add_node(
    nodes: list[NodeProto],
    operator: str,
    inputs: Sequence[str],
    output: str,
    *,
    domain: str = "",
    **options: Any,
) -> str:
    """Append a node; the name of its output."""
    nodes.append(helper.make_node(operator, list(inputs), [output], domain=domain, **options))
    return output


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
