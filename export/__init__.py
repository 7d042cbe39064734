"""Trained models to bundles: merge, trace, quantize, measure, write."""

import sys

sys.modules["kernels"] = None  # type: ignore[assignment]  # see train/__init__.py
