"""Processors that int8 weights are made for."""

from __future__ import annotations

WEIGHT_RANGE = {"avx2": 63, "avx512_vnni": 127, "arm64": 127}
"""Target -> largest weight whose products cannot saturate there."""
SAFE_TARGET = "avx2"
"""Its weights are safe everywhere."""
