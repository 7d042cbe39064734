"""Attention in tiles: some queries against the keys that they see, not all against all.

In a pack most tokens don't see most others. Its rows are cut into a fixed number of tiles, of any
size, and each tile has the list of the keys that any of its rows sees; which these are is decided
for each pack where its tree is known (`ercbatch/scoring/tiles.py`), and is an input of the graph.
What a row sees stands in the same order as before, and the mask still hides what only other rows of
its tile see: nothing changes but what is not computed. (FlexAttention's block masks and Hydragen,
arXiv 2402.05099, leave the same out.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto, TensorProto, helper

from ercbatch.scoring.tiles import KEY_COUNTS, KEYS, ROW_COUNTS
from export.graph.nodes import Graph, add_node, attributes
from export.graph.shapes import BY_ELEMENT, Shape, infer_shapes

TILES = 8
"""In every graph: more make the smallest packs slower than they make the largest ones faster."""
_SCORE_OPERATORS = frozenset("Add Cast Div Identity Mul Sub Tanh".split())
"""What may happen to scores between the product of queries and keys and the softmax."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """The nodes of one attention.

    These are the product of queries and keys, the nodes up to the softmax and after it, and the
    product with the values.
    """

    scores: NodeProto
    between: Sequence[NodeProto]
    product: NodeProto


@dataclass(slots=True)
class _Parts:
    """What of a graph's values belongs to each tile; made once for each value."""

    graph: Graph
    shapes: Mapping[str, Shape]
    length: str
    keys: Sequence[str]
    by_value: dict[str, list[str]] = field(default_factory=dict)

    def of(self, value: str, nodes: list[NodeProto]) -> list[str]:
        """The part for each tile of a value that is broadcast to scores.

        What is computed element by element, as a mask is, is computed for each tile.
        """
        if value not in self.by_value:
            rows, keys = (size == self.length for size in (1, 1, *self._shape(value))[-2:])
            node = self.graph.producers.get(value)
            if rows and keys and node is not None and self._by_element(node):
                self.by_value[value] = self._computed(node, nodes)
            else:
                parts = self.rows(value, nodes) if rows else [value] * len(self.keys)
                if keys:
                    parts = [
                        add_node(nodes, "Gather", [part, index], f"{value}_tile_{n}", axis=-1)
                        for n, (part, index) in enumerate(zip(parts, self.keys, strict=True))
                    ]
                self.by_value[value] = parts
        return self.by_value[value]

    def rows(self, value: str, nodes: list[NodeProto]) -> list[str]:
        """The rows of each tile along the last axis but one."""
        names = [f"{value}_rows_{n}" for n in range(len(self.keys))]
        nodes.append(helper.make_node("Split", [value, ROW_COUNTS], names, axis=-2))
        return names

    def _shape(self, value: str) -> Shape:
        return self.shapes.get(value, self.graph.shape(value) or ())

    def _by_element(self, node: NodeProto) -> bool:
        if node.op_type == "Unsqueeze":  # before the last two axes
            place = self.graph.integer(node.input[1])
            return place is not None and 0 <= place < len(self._shape(node.output[0])) - 2
        return node.op_type in BY_ELEMENT

    def _computed(self, node: NodeProto, nodes: list[NodeProto]) -> list[str]:
        is_unsqueeze = node.op_type == "Unsqueeze"
        inputs = [
            [name] * len(self.keys) if is_unsqueeze and number else self.of(name, nodes)
            for number, name in enumerate(node.input)
        ]
        return [
            copy_node(node, list(tile_inputs), f"{node.output[0]}_tile_{n}", nodes)
            for n, tile_inputs in enumerate(zip(*inputs, strict=True))
        ]


def tile_attention(graph: Graph) -> int:
    """Put attention over all tokens of a pack into tiles; how often there was such.

    What isn't a softmax of queries times keys stays as it is. The graph has the inputs of tiles in
    any case.
    """
    for name, size in ((ROW_COUNTS, TILES), (KEYS, f"all_{KEYS}"), (KEY_COUNTS, TILES)):
        graph.model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.INT64, [size])
        )
    shapes = infer_shapes(graph)
    length = shapes["tokens"][1]
    assert isinstance(length, str)  # the axis is dynamic
    attentions = [
        attention
        for node in graph.nodes
        if node.op_type == "Softmax"
        and shapes.get(node.output[0], ())[-2:] == (length, length)
        and (attention := _attention(graph, node, shapes)) is not None
    ]
    keys = [f"{KEYS}_{n}" for n in range(TILES)]
    key_split = [helper.make_node("Split", [KEYS, KEY_COUNTS], keys, axis=0)]
    parts = _Parts(graph, shapes, length, keys)
    for attention in attentions:
        nodes = _tiled(graph, attention, parts)
        graph.replace(attention.product, [*key_split, *nodes])
        key_split = []
    graph.apply()
    return len(attentions)


def _attention(graph: Graph, softmax: NodeProto, shapes: Mapping[str, Shape]) -> _Attention | None:
    if attributes(softmax).get("axis", -1) not in (-1, len(shapes[softmax.output[0]]) - 1):
        return None
    between = [softmax]
    while (node := graph.producers.get(between[0].input[0])) is not None:
        if not graph.used_once(node.output[0]):
            return None
        if node.op_type == "MatMul":
            break
        if node.op_type not in _SCORE_OPERATORS:
            return None
        # The scores come first, or the operator takes its inputs in any order.
        shape = shapes[softmax.output[0]]
        full = [name for name in node.input if shapes.get(name) == shape]
        if len(full) != 1 or (full[0] != node.input[0] and node.op_type not in ("Add", "Mul")):
            return None
        if full[0] != node.input[0]:
            node.input[0], node.input[1] = node.input[1], node.input[0]
        between.insert(0, node)
    if node is None or any(graph.is_matrix(graph.source(name)) for name in node.input):
        return None
    while graph.used_once(between[-1].output[0]):
        (user,) = graph.users[between[-1].output[0]]
        if user.op_type == "MatMul" and user.input[0] == between[-1].output[0]:
            return _Attention(node, between, user)
        if user.op_type not in ("Cast", "Identity"):
            return None
        between.append(user)
    return None


def _tiled(graph: Graph, attention: _Attention, parts: _Parts) -> list[NodeProto]:
    nodes: list[NodeProto] = []
    queries, transposed_keys = attention.scores.input
    values = attention.product.input[1]
    output = attention.product.output[0]
    dimensions = len(parts.shapes[attention.scores.output[0]])
    permutation = [*range(dimensions - 2), dimensions - 1, dimensions - 2]
    keys = _untransposed(graph, transposed_keys, permutation, nodes)
    results = []
    rows = parts.rows(queries, nodes)
    for number, index in enumerate(parts.keys):
        gathered = {}
        for name in (keys, values):
            gathered[name] = f"{name}_tile_{number}"
            add_node(nodes, "Gather", [name, index], gathered[name], axis=dimensions - 2)
        transposed = add_node(
            nodes, "Transpose", [gathered[keys]], f"{gathered[keys]}_turned", perm=permutation
        )
        scores = f"{attention.scores.output[0]}_{number}"
        add_node(nodes, "MatMul", [rows[number], transposed], scores)
        for node in attention.between:
            others = [parts.of(name, nodes)[number] for name in node.input[1:]]
            scores = copy_node(node, [scores, *others], f"{node.output[0]}_{number}", nodes)
        results.append(f"{output}_{number}")
        add_node(nodes, "MatMul", [scores, gathered[values]], results[-1])
    add_node(nodes, "Concat", results, output, axis=dimensions - 2)
    return nodes


def copy_node(node: NodeProto, inputs: Sequence[str], output: str, nodes: list[NodeProto]) -> str:
    """Append a node like this one, on other inputs; the name of its output."""
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.name = ""  # a name is of one node
    del copied.input[:]
    copied.input.extend(inputs)
    copied.output[0] = output
    nodes.append(copied)
    return output


def _untransposed(
    graph: Graph, name: str, permutation: Sequence[int], nodes: list[NodeProto]
) -> str:
    """A value whose last two axes are exchanged, as it was before that."""
    node = graph.producers.get(name)
    order = list(permutation)
    if node is not None and node.op_type == "Transpose":
        before = attributes(node)["perm"]
        name, order = node.input[0], [before[place] for place in permutation]
    if order == sorted(order):
        return name
    return add_node(nodes, "Transpose", [name], f"{name}_straight", perm=order)
