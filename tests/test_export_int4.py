"""Four bits in blocks: one matrix product at a time."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.products import Array, constants, error, product, run

from export.graph.nodes import Graph
from export.quantize.int4 import BLOCK, quantize_products_to_4_bits
from export.quantize.statistics import Statistics

pytestmark = pytest.mark.transformers


def quantized(weight: Array, rows: Array | None = None) -> Graph:
    graph = Graph(product(weight))
    seen = {} if rows is None else {"w": Statistics.of(rows)}
    quantize_products_to_4_bits(graph, sampler=lambda names: seen)
    return graph


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("inputs", [96, 70, 20])
def test_a_product_is_near_the_float_one(random: np.random.Generator, inputs: int) -> None:
    """Where the last block is not full too."""
    weight = random.uniform(-1, 1, (inputs, 40)).astype(np.float32)
    x = random.normal(size=(2, 7, inputs)).astype(np.float32)
    model = quantized(weight).finish()
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    packed = constants(model)["w_int4"]
    assert packed.shape == (40, -(-inputs // BLOCK), BLOCK // 2)
    assert error(run(model, x)[0], x @ weight) < 0.1


def test_weights_on_the_grid_come_out_as_they_were(random: np.random.Generator) -> None:
    """All 16 levels are used, whichever sign the greatest magnitude has."""
    levels = random.integers(-7, 8, (64, 8)).astype(np.float32)
    levels[::BLOCK] = -8
    levels[:, 4:] *= -1
    one_hot = np.eye(64, dtype=np.float32)[None]
    weight = levels / np.float32(4)
    result = run(quantized(weight).finish(), one_hot)[0][0]
    assert np.abs(result - weight).max() < 1e-2


def test_a_row_is_the_same_alone_and_amid_far_greater_rows(random: np.random.Generator) -> None:
    weight = random.uniform(-1, 1, (96, 40)).astype(np.float32)
    model = quantized(weight).finish()
    row = random.normal(size=(1, 96)).astype(np.float32)
    amid = np.concatenate([random.normal(size=(5, 96)).astype(np.float32) * 1000, row])
    assert np.array_equal(run(model, row[None])[0][0, 0], run(model, amid[None])[0][0, 5])


def test_samples_make_the_rounding_errors_of_a_product_cancel(random: np.random.Generator) -> None:
    weight = random.uniform(-1, 1, (96, 40)).astype(np.float32)
    mixing = random.normal(size=(12, 96)) + 0.1 * random.normal(size=(1, 96))
    rows = (random.normal(size=(600, 12)) @ mixing).astype(np.float32)
    sampled, unseen = rows[:400], rows[None, 400:]
    alone = error(run(quantized(weight).finish(), unseen)[0], unseen @ weight)
    together = error(run(quantized(weight, sampled).finish(), unseen)[0], unseen @ weight)
    assert together < 0.5 * alone
