"""Rounding weights to few bits: each alone, or so that the errors of a product cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from export.graph.nodes import Array

_DAMPING = 0.01
"""Added to the correlation's diagonal, as a share of its mean: samples are few."""

_ROWS = 4096
"""Rows that are rounded at a time."""
_BLOCK = 64
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
    places = np.abs(blocks).argmax(axis=2, keepdims=True)
    scales = np.take_along_axis(blocks, places, axis=2) / lowest
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.repeat(scales[..., 0], block, axis=1)


def quantize_rows(table: Array, limit: int) -> tuple[npt.NDArray[np.int8], Array]:
    """(int8 [rows, n] within +-limit, float32 scales [rows, 1]) of a table [rows, n]."""
    scales = row_scales(table, limit)
    return round_alone(table, scales, -limit, limit), scales


def round_alone(table: Array, scales: Array, low: int, high: int) -> npt.NDArray[np.int8]:
    """A table [rows, n] in steps of `scales` ([rows, 1] or [rows, n]), from low to high."""
    values = np.empty(table.shape, np.int8)
    for start in range(0, len(table), _ROWS):  # a vocabulary is much to have twice in float32
        rows = slice(start, start + _ROWS)
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
    rest = table[:, order].astype(np.float64)
    steps = np.broadcast_to(scales, table.shape)[:, order]
    upper = _inverse_factor(correlation[np.ix_(order, order)])
    rounded = np.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = np.zeros_like(rest[:, block])
        for i in range(start, start + errors.shape[1]):
            rounded[:, i] = np.round(rest[:, i] / steps[:, i]).clip(low, high)
            error = (rest[:, i] - rounded[:, i] * steps[:, i]) / upper[i, i]
            rest[:, i : block.stop] -= error[:, None] * upper[i, i : block.stop]
            errors[:, i - start] = error
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    values = np.empty(table.shape, dtype=np.int8)
    values[:, order] = rounded
    return values


def _inverse_factor(correlation: Array) -> npt.NDArray[np.float64]:
    """U, upper triangular: U.T @ U is the inverse of the damped correlation."""
    found = torch.from_numpy(correlation).double()
    found.diagonal().add_(_DAMPING * found.diagonal().mean() + 1e-12)
    # Each step lets go of the one before: a matrix may have hundreds of megabytes.
    found = torch.linalg.cholesky(found)
    found = torch.cholesky_inverse(found)
    upper: npt.NDArray[np.float64] = torch.linalg.cholesky(found, upper=True).numpy()
    return upper
