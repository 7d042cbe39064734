"""Per-token int8: one matrix product, one lookup, one shared activation at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers.products import Array, constants, error, graph, product, run
from onnx import ModelProto, helper

from export.graph.nodes import Graph
from export.quantize.int8 import quantize_lookups, quantize_products
from export.quantize.statistics import Statistics

pytestmark = pytest.mark.transformers

K, N = 96, 40


def quantized(model: ModelProto, rows: Array | None = None, weight_range: int = 63) -> ModelProto:
    """With `rows` [n, K] as what was seen of x."""
    changed = Graph(model)
    seen = {} if rows is None else {"w": Statistics.of(rows)}
    quantize_products(changed, weight_range=weight_range, sampler=lambda names: seen)
    return changed.finish()


def looked_up(model: ModelProto, smallest: int) -> ModelProto:
    changed = Graph(model)
    quantize_lookups(changed, smallest_table=smallest)
    return changed.finish()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def weight(random: np.random.Generator) -> Array:
    return random.uniform(-1, 1, (K, N)).astype(np.float32)


@pytest.fixture
def x(random: np.random.Generator) -> Array:
    return random.normal(size=(2, 7, K)).astype(np.float32)


@pytest.mark.parametrize("opset", [15, 17, 18, 21])
def test_a_product_is_near_the_float_one(x: Array, weight: Array, opset: int) -> None:
    result = run(quantized(product(weight, opset)), x)[0]
    assert result.shape == (2, 7, N)
    assert error(result, x @ weight) < 0.015


def test_a_row_is_the_same_alone_and_amid_far_greater_rows(x: Array, weight: Array) -> None:
    """One scale for the tensor would leave nothing of the small row: the reason for per-token."""
    model = quantized(product(weight))
    row = x[0, 3]
    amid = np.concatenate([x[0, :3] * 1000, row[None], x[1] * 1000])
    assert np.array_equal(run(model, row[None, None])[0][0, 0], run(model, amid[None])[0][0, 3])


def test_a_row_of_zeros_gives_zeros(weight: Array) -> None:
    assert not run(quantized(product(weight)), np.zeros((1, 3, K), np.float32))[0].any()


@pytest.mark.parametrize("weight_range", [63, 127])
def test_weights_stay_in_range_and_the_float_ones_are_gone(
    weight: Array, weight_range: int
) -> None:
    """Beyond 63, AVX2 without VNNI saturates."""
    kept = constants(quantized(product(weight), weight_range=weight_range))
    matrix = kept["w_int8"]
    assert matrix.dtype == np.int8
    assert np.abs(matrix.astype(int)).max() == weight_range
    assert all(value.shape != (K, N) or value.dtype == np.int8 for value in kept.values())


def test_products_at_the_largest_values_do_not_saturate() -> None:
    """255 and 63 in every place: the case that 16-bit pair sums must hold."""
    x, weight = np.ones((1, 2, K), np.float32), np.ones((K, N), np.float32)
    assert np.allclose(run(quantized(product(weight)), x)[0], K, rtol=1e-5)


def test_a_gemm_keeps_its_bias(x: Array, weight: Array) -> None:
    bias = np.arange(N, dtype=np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    model = graph([node], {"w": np.ascontiguousarray(weight.T), "b": bias}, rank=2)
    model = quantized(model)
    assert "MatMulIntegerToFloat" in {n.op_type for n in model.graph.node}
    assert error(run(model, x[0])[0], x[0] @ weight + bias) < 0.015


def test_a_transposed_constant_is_folded(x: Array, weight: Array) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
    ]
    model = quantized(graph(nodes, {"w": np.ascontiguousarray(weight.T)}))
    assert "Transpose" not in {n.op_type for n in model.graph.node}
    assert error(run(model, x)[0], x @ weight) < 0.015


def test_other_products_stay(weight: Array) -> None:
    """A scaled Gemm, and a product of two activations."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["scaled"], alpha=2.0),
        helper.make_node("MatMul", ["scaled", "scaled"], ["y"]),
    ]
    model = graph(nodes, {"w": weight}, rank=2)
    before = Counter(node.op_type for node in model.graph.node)
    assert Counter(node.op_type for node in quantized(model).graph.node) == before


def test_products_of_one_activation_quantize_it_once(x: Array, random: np.random.Generator) -> None:
    """The query, key and value of attention."""
    weights = {name: random.uniform(-1, 1, (K, N)).astype(np.float32) for name in "qkv"}
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in weights]
    model = quantized(graph(nodes, weights, ["yq", "yk", "yv"]))
    counts = Counter(n.op_type for n in model.graph.node)
    operators = ("MatMulIntegerToFloat", "QuantizeLinear", "ReduceMax")
    assert [counts[name] for name in operators] == [3, 1, 1]
    for result, matrix in zip(run(model, x), weights.values(), strict=True):
        assert error(result, x @ matrix) < 0.015


def test_samples_keep_outlier_channels_in_float(x: Array, weight: Array) -> None:
    x[..., [5, 60]] *= 50
    plain = run(quantized(product(weight)), x)[0]
    model = quantized(product(weight), x[0])
    assert constants(model)["x_rows_places"].tolist() == [5, 60]
    result = run(model, x)[0]
    assert error(result, x @ weight) < error(plain, x @ weight) / 5


def test_few_samples_without_outliers_change_nothing(x: Array, weight: Array) -> None:
    plain = quantized(product(weight))
    assert quantized(product(weight), x[0]) == plain


def test_many_samples_make_the_rounding_errors_of_a_product_cancel(
    weight: Array, random: np.random.Generator
) -> None:
    """As in a transformer, the channels of these activations go together."""
    mixing = random.normal(size=(12, K)) + 0.1 * random.normal(size=(1, K))
    rows = (random.normal(size=(600, 12)) @ mixing).astype(np.float32)
    rows[:, 7] *= 30  # and one of them is far greater: it stays float32
    sampled, unseen = rows[:400], rows[None, 400:]
    plain = quantized(product(weight), sampled[:20])
    model = quantized(product(weight), sampled)
    for kept in (constants(plain), constants(model)):
        assert kept["x_rows_places"].tolist() == [7]
        assert not kept["w_int8"][7].any()
        assert np.abs(kept["w_int8"].astype(int)).max() <= 63
    wanted = unseen @ weight
    assert error(run(model, unseen)[0], wanted) < 0.75 * error(run(plain, unseen)[0], wanted)


def test_a_lookup_reads_int8_rows(random: np.random.Generator) -> None:
    table = (random.normal(size=(300, 32)) * 10.0 ** random.integers(-3, 3, (300, 1))).astype(
        np.float32
    )
    table[7] = 0
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    model = graph([node], {"table": table}, rank=2)
    model = looked_up(model, 1000)
    assert model.ByteSize() < table.nbytes / 3
    ids = np.array([[0, 7, 299], [7, 12, 0]])
    result = run(model, ids)[0]
    assert result.shape == (2, 3, 32)
    steps = np.abs(table[ids]).max(axis=-1, keepdims=True) / 127
    assert (np.abs(result - table[ids]) <= steps * 0.501).all()


@pytest.mark.parametrize(("axis", "smallest"), [(0, 301 * 32), (1, 1000)])
def test_small_tables_and_other_axes_stay(
    random: np.random.Generator, axis: int, smallest: int
) -> None:
    table = random.normal(size=(300, 32)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "x"], ["y"], axis=axis)
    model = graph([node], {"table": table}, rank=2)
    assert [node.op_type for node in looked_up(model, smallest).graph.node] == ["Gather"]


def test_one_table_can_be_looked_up_and_multiplied(random: np.random.Generator) -> None:
    """Tied embeddings."""
    table = random.uniform(-1, 1, (2100, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["row"]),
        helper.make_node("Transpose", ["table"], ["output"], perm=[1, 0]),
        helper.make_node("MatMul", ["row", "output"], ["y"]),
    ]
    model = quantized(looked_up(graph(nodes, {"table": table}, rank=1), 1000))
    assert "table" not in constants(model)
    ids = np.arange(5)
    assert error(run(model, ids)[0], table[ids] @ table.T) < 0.02


def test_a_weight_of_two_activations_has_the_float_columns_of_each(
    x: Array, random: np.random.Generator
) -> None:
    """Layers that share their weights."""
    square = random.uniform(-1, 1, (K, K)).astype(np.float32) / np.float32(K)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["once"]),
        helper.make_node("MatMul", ["once", "w"], ["y"]),
    ]
    x[..., 5] *= 50
    model = quantized(graph(nodes, {"w": square}), x[0])
    assert error(run(model, x)[0], x @ square @ square) < 0.02
