"""Rounding weights to few bits: each alone, or so that the errors of a product cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from export.graph.nodes import Array

_DAMPING = 0.01
"""Added to the correlation's diagonal, as a share of its mean: samples are few."""

_ROWS_PER_CHUNK = 4096
"""Rows that are rounded at a time."""
_COLUMNS_PER_BLOCK = 64
"""Columns whose errors reach the columns after them in one product."""


def row_scales(table: Array, limit: int) -> Array:
    """float32 scales [rows, 1] that bring a table [rows, n] within +-limit."""
    high = np.maximum(table.max(axis=1, keepdims=True), -table.min(axis=1, keepdims=True))
    scales = high / limit
    return np.where(scales == 0, 1, scales).astype(np.float32)


def block_scales(table: Array, lowest: int, block: int) -> Array:
    """float32 scales [rows, n] of a table [rows, n], one for each `block` columns of a row.

    The greatest magnitude of a block comes to `lowest`, whatever its sign: of 16 levels, -8 to 7,
    one would be lost otherwise. n is a multiple of `block`.
    """
    blocks = table.reshape(len(table), -1, block)
    peaks = np.abs(blocks).argmax(axis=2, keepdims=True)
    scales = np.take_along_axis(blocks, peaks, axis=2) / lowest
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.repeat(scales[..., 0], block, axis=1)


def quantize_rows(table: Array, limit: int) -> tuple[npt.NDArray[np.int8], Array]:
    """(int8 [rows, n] within +-limit, float32 scales [rows, 1]) of a table [rows, n]."""
    scales = row_scales(table, limit)
    return round_alone(table, scales, -limit, limit), scales


def round_alone(table: Array, scales: Array, low: int, high: int) -> npt.NDArray[np.int8]:
    """A table [rows, n] in steps of `scales` ([rows, 1] or [rows, n]), from low to high."""
    values = np.empty(table.shape, np.int8)
    for start in range(
        0, len(table), _ROWS_PER_CHUNK
    ):  # a vocabulary is much to have twice in float32
        rows = slice(start, start + _ROWS_PER_CHUNK)
        values[rows] = np.round(table[rows] / scales[rows]).clip(low, high)
    return values


def round_together(
    table: Array, scales: Array, low: int, high: int, correlation: Array
) -> npt.NDArray[np.int8]:
    """Like `round_alone`, for a table that multiplies activations of this correlation [n, n].

    GPTQ (arXiv 2210.17323): columns are rounded one after another, those of the strongest
    activations first, and the error of each is made up for in the columns that are still to come,
    as far as their activations go together.
    """
    order = np.argsort(-np.diag(correlation), kind="stable")
    remaining = table[:, order].astype(np.float64)
    steps = np.broadcast_to(scales, table.shape)[:, order]
    upper = _inverse_factor(correlation[np.ix_(order, order)])
    rounded = np.empty_like(remaining)
    for start in range(0, remaining.shape[1], _COLUMNS_PER_BLOCK):
        block = slice(start, start + _COLUMNS_PER_BLOCK)
        errors = np.zeros_like(remaining[:, block])
        for i in range(start, start + errors.shape[1]):
            rounded[:, i] = np.round(remaining[:, i] / steps[:, i]).clip(low, high)
            error = (remaining[:, i] - rounded[:, i] * steps[:, i]) / upper[i, i]
            remaining[:, i : block.stop] -= error[:, None] * upper[i, i : block.stop]
            errors[:, i - start] = error
        remaining[:, block.stop :] -= errors @ upper[block, block.stop :]
    values = np.empty(table.shape, dtype=np.int8)
    values[:, order] = rounded
    return values


def _inverse_factor(correlation: Array) -> npt.NDArray[np.float64]:
    """U, upper triangular: U.T @ U is the inverse of the damped correlation."""
    matrix = torch.from_numpy(correlation).double()
    matrix.diagonal().add_(_DAMPING * matrix.diagonal().mean() + 1e-12)
    # Each step lets go of the one before: a matrix may have hundreds of megabytes.
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix)
    upper: npt.NDArray[np.float64] = torch.linalg.cholesky(matrix, upper=True).numpy()
    return upper
