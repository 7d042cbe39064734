"""Rounding weights to few bits: each alone, or so that the errors of a product cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Correlation = npt.NDArray[np.float64]

_DAMPING = 0.01
"""Added to the correlation's diagonal, as a share of its mean: samples are few."""

_BLOCK = 64
"""Columns whose errors reach the columns after them in one product."""


def row_scales(table: Array, limit: int) -> Array:
    """float32 scales [rows, 1] that bring a table [rows, n] within +-limit."""
    scales = np.abs(table).max(axis=1, keepdims=True) / limit
    return np.where(scales == 0, 1, scales).astype(np.float32)


def block_scales(table: Array, limit: int, block: int) -> Array:
    """float32 scales [rows, n] like `row_scales`, one for each `block` columns of a row; n is a
    multiple of `block`."""
    rows, n = table.shape
    scales = row_scales(table.reshape(-1, block), limit)
    return np.repeat(scales.reshape(rows, n // block), block, axis=1)


def quantize_rows(table: Array, limit: int) -> tuple[npt.NDArray[np.int8], Array]:
    """(int8 [rows, n] within +-limit, float32 scales [rows, 1]) of a table [rows, n]."""
    scales = row_scales(table, limit)
    return round_alone(table, scales, limit), scales


def round_alone(table: Array, scales: Array, limit: int) -> npt.NDArray[np.int8]:
    """A table [rows, n] in steps of `scales` ([rows, 1] or [rows, n]), within +-limit."""
    return np.round(table / scales).clip(-limit, limit).astype(np.int8)


def round_together(
    table: Array, scales: Array, limit: int, correlation: Correlation
) -> npt.NDArray[np.int8]:
    """Like `round_alone`, for a table that multiplies activations of this correlation [n, n].

    GPTQ (arXiv 2210.17323): columns are rounded one after another, those of the strongest
    activations first, and the error of each is made up for in the columns that are still to come,
    as far as their activations go together.
    """
    order = np.argsort(-np.diag(correlation), kind="stable")
    rest = table[:, order].astype(np.float64)
    steps = np.broadcast_to(scales, table.shape)[:, order]
    damped = correlation[np.ix_(order, order)].copy()
    damped[np.diag_indices_from(damped)] += _DAMPING * np.diag(damped).mean() + 1e-12
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = np.zeros_like(rest[:, block])
        for i in range(start, start + errors.shape[1]):
            rounded[:, i] = np.round(rest[:, i] / steps[:, i]).clip(-limit, limit)
            error = (rest[:, i] - rounded[:, i] * steps[:, i]) / upper[i, i]
            rest[:, i : block.stop] -= error[:, None] * upper[i, i : block.stop]
            errors[:, i - start] = error
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    values = np.empty(table.shape, dtype=np.int8)
    values[:, order] = rounded
    return values
