"""Rounding weights to int8: each alone, or so that the errors of a product cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Correlation = npt.NDArray[np.float64]

_DAMPING = 0.01
"""Added to the correlation's diagonal, as a share of its mean: samples are few."""

_BLOCK = 64
"""Columns whose errors reach the columns after them in one product."""


def quantize_rows(table: Array, limit: int) -> tuple[npt.NDArray[np.int8], Array]:
    """(int8 [rows, n] within +-limit, float32 scales [rows, 1]) of a table [rows, n]."""
    scales = np.abs(table).max(axis=1, keepdims=True) / limit
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.round(table / scales).clip(-limit, limit).astype(np.int8), scales


def quantize_rows_for(
    table: Array, limit: int, correlation: Correlation
) -> tuple[npt.NDArray[np.int8], Array]:
    """Like `quantize_rows`, for a table that multiplies activations of this correlation [n, n].

    GPTQ (arXiv 2210.17323): columns are rounded one after another, those of the strongest
    activations first, and the error of each is made up for in the columns that are still to come,
    as far as their activations go together. The scales are those of `quantize_rows`.
    """
    _, scales = quantize_rows(table, limit)
    order = np.argsort(-np.diag(correlation), kind="stable")
    rest = table[:, order].astype(np.float64)
    damped = correlation[np.ix_(order, order)].copy()
    damped[np.diag_indices_from(damped)] += _DAMPING * np.diag(damped).mean() + 1e-12
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = np.zeros_like(rest[:, block])
        for i in range(start, start + errors.shape[1]):
            rounded[:, i] = np.round(rest[:, i] / scales[:, 0]).clip(-limit, limit)
            error = (rest[:, i] - rounded[:, i] * scales[:, 0]) / upper[i, i]
            rest[:, i : block.stop] -= error[:, None] * upper[i, i : block.stop]
            errors[:, i - start] = error
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    values = np.empty(table.shape, dtype=np.int8)
    values[:, order] = rounded
    return values, scales
